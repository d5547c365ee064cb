"""Where this node keeps the job's state, nearest first: slots in RAM, the checkpoints' place, the job directory."""

from __future__ import annotations

import platform
import threading
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO

from supervisor.about import version
from supervisor.checkpoint.in_parts import finish_left
from supervisor.checkpoint.location import Location
from supervisor.checkpoint.manifest import Key
from supervisor.checkpoint.storage import LocalStorage, Owner, open_storage
from supervisor.company import Company, Team
from supervisor.config import Options
from supervisor.copier import drained
from supervisor.decide import rollback
from supervisor.draining import Draining, Stamp
from supervisor.edge import claiming, clock, jobdir
from supervisor.edge.console import Console
from supervisor.edge.threads import in_thread
from supervisor.errors import CheckpointError, EverstepError
from supervisor.ledger import Ledger
from supervisor.model import CheckpointRejected, Failure, StatesCondemned, Tier
from supervisor.resume import Age, Resume, Sources, choose
from supervisor.shared_snapshots import SharedSnapshots
from supervisor.snapshots import Snapshots
from supervisor.staging import Staging


class Stores:
    """The snapshots, their draining, and the way back. Raises ConfigError for a place that cannot be used."""

    def __init__(
        self,
        options: Options,
        job: jobdir.JobDirectory,
        file: jobdir.JobFile,
        ledger: Ledger,
        console: Console,
        team: Team | None = None,
    ) -> None:
        self._job, self._epoch = job, file.epoch
        self._ledger, self._console = ledger, console
        self._key = Key.from_environment()
        self._owner = Owner(file.run_id, file.epoch)
        where = options.checkpoints_directory
        if isinstance(where, Path):
            where = where.absolute()
        self._storage = open_storage(where, self._key, timeout=options.storage_timeout)
        place = refuge(options, job)
        self._refuge = LocalStorage(place, self._key) if place is not None else None
        #: the attempts in which ranks could not load it, though nothing was seen to be wrong with it
        self._unloadable: defaultdict[Location, set[int]] = defaultdict(set)
        record = ledger.record
        # the newest failure may have been one to load what it should have; nothing newer was saved since
        self._suspicious = (
            record.last_failure is not None and record.committed_step <= record.failure_committed_step
        )
        self._suspected_at: Age | None = None  # what was the newest checkpoint of this run then
        self._claim: IO[str] | None = None  # of a directory that is not the job's own
        self._looked = False  # at what checkpoints there are: from then on this run knows of every newer one
        runtime = Path(file.runtime)
        #: the state in RAM
        self.snapshots = (Snapshots if team is None else SharedSnapshots)(
            runtime, run_id=file.run_id, key=self._key, fact=ledger.add, report=console.say
        )
        #: where this node leads others, all that is between them
        self.company = None
        if team is not None:
            assert isinstance(self.snapshots, SharedSnapshots)
            self.company = Company(
                team,
                options,
                job,
                ledger,
                console,
                self.snapshots,
                self._key,
                epoch=file.epoch,
                run_id=file.run_id,
                runtime=runtime,
            )
            ledger.is_ours = self._is_ours
        self.snapshots.condemn(self._is_bad)
        #: how it becomes durable
        self.draining = Draining(
            self.snapshots,
            self._storage,
            self._refuge,
            stamp=Stamp(
                file.run_id, file.epoch, {"everstep": version(), "python": platform.python_version()}
            ),
            policy=options.retention,
            bandwidth=options.checkpoint_bandwidth,
            grace=options.grace,
            fence=lambda: job.fence(file.epoch),
            fact=ledger.add,
            report=console.say,
            is_bad=self._is_bad,
            copy=drained if self.company is None else self.company.drain,
        )
        #: what was fetched for the ranks to read
        self.staging = Staging(runtime, job.path)

    def _is_ours(self) -> bool:
        """Whether no other node leads the job: certainly under a lease that holds, else as far as the directory tells."""
        assert self.company is not None
        if self.company.joining.leads:
            return True
        try:
            self._job.fence(self._epoch)
        except EverstepError:
            return False
        return True

    async def sweep(self) -> list[Location]:
        """Find out that the checkpoints' place can be used, and remove what was never finished there; what was removed.

        Raises ConfigError, StorageError.
        """
        where = self._storage.where
        if isinstance(where, Path) and where != self._job.path / "checkpoints":
            self._claim = claiming.claim(where, self._owner.run_id, self._job.path)
        swept = await in_thread(lambda: self._storage.sweep(self._owner))
        # also where the job runs on one node now; in the job directory may be emergency copies
        emergency = LocalStorage(self._job.path / "checkpoints", self._key)
        for storage in (self._storage, emergency):
            place = storage.parts(self._owner)
            for step in await in_thread(partial(finish_left, place, lambda: self._job.fence(self._epoch))):
                self._console.say(f"step {step} was durable on all nodes: it is a checkpoint now")
        return swept

    async def choose(self, nodes: int = 1) -> Resume:
        """Where the next attempt, of so many nodes, resumes. Raises CheckpointError, StorageError."""
        unsound = self.snapshots.drop_unsound()
        places = [self._storage] if self._refuge is None else [self._storage, self._refuge]
        newest = None
        if self._looked and self._refuge is not None:
            newest = self.draining.newest_committed or (-1, -1)
        sources = Sources(
            self.snapshots.newest(), places, self._key, self.staging, newest, self._is_bad, nodes, self._is_suspicious,
        )  # fmt: skip
        over = threading.Event()
        try:
            resume = await in_thread(lambda: choose(sources, over.is_set))
        finally:
            over.set()
        self._looked = True
        now = clock.now()
        for path, reason in (*unsound, *resume.rejected):
            self._ledger.add(CheckpointRejected(time=now, path=str(path), reason=reason))
            self._console.say(f"{path} is damaged: {reason}; skipping it")
        if resume.tier is None and self._ledger.record.rolled_from:
            raise CheckpointError(
                f"no state from before the trouble is left in {self._storage.where}: start anew in another --dir"
            )
        if resume.tier is not Tier.RAM:
            self.snapshots.drop_all()
            self.draining.known_good(resume.step if resume.tier is Tier.CHECKPOINT else None)
            await self.bring(resume.kept)
        return resume

    async def bring(self, kept: Location | None) -> bool:
        """If ``kept`` is an emergency copy, begin to store it where it belongs; whether it is."""
        refuge = self._refuge
        if refuge is None or not isinstance(kept, Path) or kept.parent != refuge.where:
            return False
        for record in await in_thread(refuge.records):
            if record.path == kept and record.problem is None:
                self.draining.bring(record)
                return True
        return False

    async def condemn(self, failure: Failure) -> None:
        """Where numbers have gone wrong, what was saved since is not used again, whatever the verdict.

        Snapshots are forgotten, checkpoints in a directory taken out of the way; the journal passes over all others.
        """
        planned = rollback.plan(self._ledger.record, failure)
        if planned is None:
            return
        now = clock.now()
        self._ledger.add(
            StatesCondemned(time=now, attempt=failure.attempt, step=planned.bad_from, reason=failure.reason)
        )
        self.snapshots.condemn(self._is_bad)
        self.draining.condemn()
        self._looked = False
        await self.draining.set_aside()

    def _is_bad(self, attempt: int, step: int) -> bool:
        return rollback.is_condemned(self._ledger.record, attempt, step)

    @property
    def _is_suspicious(self) -> bool:
        """Whether what there is may hold what cannot be loaded: until this run has made a newer checkpoint."""
        return self._suspicious and self.draining.newest_committed == self._suspected_at

    def doubt(self, attempt: int, unloadable: Iterable[Location]) -> None:
        """The ranks could not load these, however whole they seem: snapshots that they could not load twice are forgotten."""
        for path in unloadable:
            self._suspicious, self._suspected_at = True, self.draining.newest_committed
            self._unloadable[path].add(attempt)
            if len(self._unloadable[path]) > 1:  # once may be the moment's fault
                if isinstance(path, Path):
                    self.snapshots.drop(path)
                self._looked = False


def refuge(options: Options, job: jobdir.JobDirectory) -> Path | None:
    """Where a checkpoint goes in need: into the job directory, if checkpoints belong on other storage than that."""
    place, own = options.checkpoints_directory, job.path / "checkpoints"
    if isinstance(place, Path) and (place.absolute() == own or _device(place.absolute()) == _device(own)):
        return None
    return own


def _device(place: Path) -> int | None:
    """The file system of a directory, which may still have to be made; None where it cannot be told."""
    for path in (place, *place.parents):
        try:
            return path.stat().st_dev
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None
