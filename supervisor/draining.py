"""From the newest snapshot to a durable checkpoint: one drain at a time, and what happens when it fails.

One checkpoint is in flight; when several snapshots wait for it, the newest wins. A drain that fails is said, journalled and
begun again with the next snapshot, after a wait that doubles: training goes on meanwhile. At the end of a run the newest
snapshot is drained within the time that is left. Where the checkpoints' place is an object store or a file system of its own
and does not take it in time, it goes into the job directory instead (an *emergency copy*). A later run resumes from there, and stores that copy where it
belongs, unless a newer snapshot comes first.

A drain runs in a thread of its own, which nobody joins: a file system whose server hangs keeps a thread for ever, and must
not keep the supervisor.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from supervisor.checkpoint import catalog, slots
from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.manifest import Manifest, Origin
from supervisor.checkpoint.storage import CheckpointStorage, LocalStorage
from supervisor.copier import Copier, drained
from supervisor.decide.retention import RetentionPolicy, to_remove
from supervisor.edge import clock
from supervisor.edge.threads import in_thread
from supervisor.errors import CancelledError, EverstepError, StorageError
from supervisor.model import CheckpointCommitted, CheckpointFailed, CheckpointsPruned, Fact

FIRST_WAIT: Final = 1.0  # seconds from a failed drain to the next attempt at one, doubling
LONGEST_WAIT: Final = 60.0
EMERGENCY_SHARE: Final = 0.3  # of the grace, kept for the copy into the job directory
EMERGENCY_LEAST: Final = 1.0  # seconds
_LOOK: Final = 0.2  # seconds between two looks at the time that is left


@dataclass(frozen=True)
class Stamp:
    """What every checkpoint of this supervisor bears."""

    run_id: str
    epoch: int
    versions: dict[str, str]


class Source(Protocol):
    """Where snapshots come from: while one is drained its slot is not written."""

    failure: str | None  # why the newest snapshot failed

    def newest(self) -> tuple[Path, slots.SlotRecord] | None:
        """The newest complete snapshot and where it lies."""
        ...

    def hold(self, path: Path | None) -> None:
        """The slot that must not be written; None: none."""
        ...


class Draining:
    """The drain of one job on this node. Used from the loop's thread only.

    ``refuge`` is where an emergency copy goes; None where ``storage`` is as near.
    """

    def __init__(
        self,
        source: Source,
        storage: CheckpointStorage,
        refuge: LocalStorage | None,
        *,
        stamp: Stamp,
        policy: RetentionPolicy,
        bandwidth: float | None,
        grace: float,
        fence: Callable[[], None],
        fact: Callable[[Fact], None],
        report: Callable[[str], None],
        is_bad: Callable[[int, int], bool] = lambda *_: False,
        copy: Copier = drained,
    ) -> None:
        self._copy = copy
        self._source, self._storage, self._refuge = source, storage, refuge
        self._stamp, self._policy, self._bandwidth = stamp, policy, bandwidth
        self._grace, self._fence, self._fact, self._report = grace, fence, fact, report
        self._is_bad = is_bad  # by attempt and step
        self._not_set_aside = [one for one in (storage, refuge) if one is not None]
        self._setting_aside = threading.Lock()
        self._waiting = False
        self._left: CheckpointRecord | None = None  # an emergency copy that is not stored where it belongs
        self._task: asyncio.Task[None] | None = None
        self._cancelled = threading.Event()
        self._good: int | None = None
        self._retry_at = 0.0
        self._failures = 0  # in a row
        self._in_flight: tuple[int, float] | None = None  # the step being drained, and since when
        self.failure: str | None = None  # why the newest drain failed, None once one has succeeded
        self.seconds: float | None = None  # of the last drain that committed
        self.newest_committed: tuple[int, int] | None = None  # attempt and step, of this run
        self.refuge_used: str | None = None  # where the emergency copy of the newest state lies
        #: steps after which the state is known to be in order: retention keeps a checkpoint of so many or fewer; None: all are
        self.proven: int | None = None
        #: when the run must be over, on the monotonic clock; None: it may take as long as it takes
        self.deadline: float | None = None

    # ------------------------------------------------------------------ when

    @property
    def is_draining(self) -> bool:
        """Whether a drain is running or waits to."""
        return self._task is not None and not self._task.done()

    def drain(self) -> None:
        """Make the newest complete snapshot durable, in the background."""
        self._waiting = True
        if not self.is_draining:
            self._task = asyncio.get_running_loop().create_task(self._drain_all())

    def bring(self, copy: CheckpointRecord) -> None:
        """Store an emergency copy of a former run where it belongs, in the background."""
        self._left = copy
        self.drain()

    def retry(self, now: float) -> None:
        """A new snapshot is there: drain it if the last drain failed and its wait is over."""
        if self._failures and not self.is_draining and now >= self._retry_at:
            self.drain()

    def cancel(self) -> None:
        """Give up the drain that is running, and all that would follow; the snapshot stays in memory."""
        self._cancelled.set()

    @property
    def under_way(self) -> float | None:
        """How many seconds ago the drain that is running began; None: none is."""
        return None if self._in_flight is None else clock.monotonic() - self._in_flight[1]

    def leaves_out_newest(self) -> bool:
        """Whether the newest snapshot is neither durable nor being made so."""
        newest = self._source.newest()
        if newest is None or self.is_durable(newest[1].step):
            return False
        return self._in_flight is None or self._in_flight[0] != newest[1].step

    # ------------------------------------------------------------------ what is durable

    def known_good(self, step: int | None) -> None:
        """The newest checkpoint that is good, as far as was looked, is the one of ``step`` (None: there is none)."""
        self._good = step

    def condemn(self) -> None:
        """States have been condemned: what was known of the newest checkpoints may be about those."""
        self._good = self.newest_committed = None
        self._not_set_aside = [one for one in (self._storage, self._refuge) if one is not None]

    async def set_aside(self) -> None:
        """Take condemned checkpoints out of the way where that is quick: in directories. Else the next drain does."""
        for storage in self._not_set_aside:
            if isinstance(storage, LocalStorage):
                try:
                    await in_thread(partial(self._set_aside, storage))
                except (EverstepError, OSError) as error:
                    self._report(f"bad checkpoints could not be set aside, and are passed over: {error}")

    def _set_aside(self, storage: CheckpointStorage) -> None:
        """In a thread, and before anything is written there: a new checkpoint of the same step must not meet a bad one."""
        with self._setting_aside:
            if storage not in self._not_set_aside:
                return
            bad = [
                record
                for record in reversed(storage.records())
                if record.manifest is not None and self._is_bad(record.manifest.origin.attempt, record.step)
            ]
            if bad:
                kept = storage.set_aside(bad)
                steps = ", ".join(str(record.step) for record in bad)
                where = f"; the first is kept as {kept}" if kept is not None else ""
                self._report(f"bad checkpoints taken out of the way: step {steps}{where}")
            self._not_set_aside = [one for one in self._not_set_aside if one is not storage]

    def is_durable(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` or a later one was committed in this run, or resumed from."""
        return self._good is not None and self._good >= step

    async def secure(self, last_step: int | None, *, may_drain: bool) -> str | None:
        """Make the newest snapshot durable, and see that ``last_step`` is; None when all is well, else what is not."""
        newest = self._source.newest()
        step = newest[1].step if newest is not None else -1
        if may_drain and ((newest is not None and not self.is_durable(step)) or self._left is not None):
            self.drain()
        await self._settle()
        if newest is not None and not self.is_durable(step) and may_drain:
            await self._take_refuge(*newest)
        elif self._left is not None:
            self._say_left(self._left.step, str(self._left.path), self.failure or "there was no time")
        why = self.failure or self._source.failure or "there was no time"
        if newest is not None and not self.is_durable(step):
            return f"the snapshot of step {step} is in memory only ({why}): run again on this host"
        if last_step is not None and not self.is_durable(last_step):
            return f"the state after the last step was not saved ({why}): run again"
        return None

    async def _settle(self) -> None:
        """Wait for the drains that are wanted; with a deadline, leave time for the emergency copy."""
        if self._task is None:
            return
        await self._wait(self._task, self._time_for_drain)
        if self._task.done():
            self._task.result()
            return
        self._cancelled.set()
        self.failure = self.failure or f"{self._storage.where} did not take it in time"
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _take_refuge(self, folder: Path, record: slots.SlotRecord) -> None:
        if self._refuge is None:
            return
        why = self.failure or "there was no time"
        cancelled = threading.Event()
        work = asyncio.ensure_future(self._commit(self._refuge, folder, self._origin(record), cancelled))
        least = clock.monotonic() + EMERGENCY_LEAST  # late as it may be
        await self._wait(work, lambda: max(self._time_left(), least - clock.monotonic()))
        cancelled.set()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        elif work.result():
            self.refuge_used = str(catalog.step_directory(self._refuge.where, record.step))
            self._say_left(record.step, self.refuge_used, why)

    def _say_left(self, step: int, where: str, why: str) -> None:
        self._report(f"{self._storage.where} did not take step {step} ({why}): it lies in {where}")

    async def _wait(self, task: asyncio.Future[Any], left: Callable[[], float]) -> None:
        """Until it is done or no time is left; a deadline may come up meanwhile."""
        while not task.done() and left() > 0:
            await asyncio.wait({task}, timeout=min(left(), _LOOK))

    def _time_left(self) -> float:
        """Where there is no refuge, to go on is the best that can be done: nobody has killed us yet."""
        if self.deadline is None or self._refuge is None:
            return math.inf
        return self.deadline - clock.monotonic()

    def _time_for_drain(self) -> float:
        """What is left of the time, less what the emergency copy is given."""
        return self._time_left() - max(EMERGENCY_LEAST, EMERGENCY_SHARE * self._grace)

    # ------------------------------------------------------------------ one drain

    async def _drain_all(self) -> None:
        while self._waiting and not self._cancelled.is_set():
            self._waiting = False
            newest = self._source.newest()
            if newest is not None and not self._is_settled(newest[1]):
                origin = self._origin(newest[1])
                stored = await self._commit(self._storage, newest[0], origin, self._cancelled)
            elif self._left is not None:
                stored = await self._bring(self._left)
            else:
                continue
            if stored:
                self._failures, self._left = 0, None
                await self._prune(self._storage)
                if self._refuge is not None:
                    await self._prune(self._refuge)
            else:
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**self._failures)
                self._failures += 1
                self._retry_at = clock.monotonic() + wait

    def _is_settled(self, record: slots.SlotRecord) -> bool:
        """Whether nothing is to be done about a snapshot."""
        return record.step == self._good or self._is_bad(record.attempt, record.step)

    def _origin(self, record: slots.SlotRecord) -> Origin:
        stamp = self._stamp
        return Origin(
            step=record.step, attempt=record.attempt, epoch=stamp.epoch, run_id=stamp.run_id,
            world_size=record.world_size, created=clock.now(), metrics=record.metrics, versions=stamp.versions,
        )  # fmt: skip

    async def _bring(self, left: CheckpointRecord) -> bool:
        """Store an emergency copy where it belongs, as what it is; True also if there is nothing to be brought."""
        if left.manifest is None or self._is_bad(left.manifest.origin.attempt, left.step):
            return True
        refuge = self._refuge

        def verified(storage: CheckpointStorage, source: Path, origin: Origin, **how: Any) -> Manifest:
            if refuge is not None and (problems := refuge.verify(left)):
                raise StorageError(f"{source} is damaged: {'; '.join(problems)}")
            return drained(storage, source, origin, **how)

        origin = replace(left.manifest.origin, epoch=self._stamp.epoch)
        folder = catalog.local(left)
        if not await self._commit(self._storage, folder, origin, self._cancelled, verified):
            return False
        self._report(f"the emergency copy of step {left.step} is in {self._storage.where} now, too")
        return True

    async def _commit(
        self,
        storage: CheckpointStorage,
        folder: Path,
        origin: Origin,
        cancelled: threading.Event,
        copy: Copier | None = None,
    ) -> bool:
        """Make a checkpoint of ``folder``: a slot, or what ``copy`` knows how to copy."""
        started = clock.monotonic()
        bandwidth = None if storage is self._refuge else self._bandwidth
        copier = copy or self._copy

        def is_off() -> bool:
            return cancelled.is_set() or self._is_bad(origin.attempt, origin.step)

        def work() -> Manifest:
            self._set_aside(storage)
            manifest = copier(
                storage, folder, origin, fence=self._fence, bandwidth=bandwidth, cancelled=is_off
            )
            if self._is_bad(origin.attempt, origin.step):  # since a moment ago
                self._not_set_aside = [*self._not_set_aside, storage]
                self._set_aside(storage)
                raise CancelledError(f"the state of step {origin.step} proved bad")
            return manifest

        if copy is None:
            self._source.hold(folder)
        self._in_flight = origin.step, started
        try:
            manifest = await in_thread(work)
        except Exception as error:  # noqa: BLE001 (no thread to be had, no memory: the next drain may fare better)
            if self._is_bad(origin.attempt, origin.step):
                return True  # there is nothing to make up for
            known = isinstance(error, EverstepError | OSError)
            self.failure = str(error) if known else f"{type(error).__name__}: {error}"
            self._fact(CheckpointFailed(time=clock.now(), step=origin.step, reason=self.failure))
            return False
        finally:
            if copy is None:
                self._source.hold(None)
            self._in_flight = None
        self.failure, self._good = None, origin.step
        self.newest_committed = origin.attempt, origin.step
        self.seconds = clock.monotonic() - started
        self._fact(
            CheckpointCommitted(
                time=clock.now(), attempt=origin.attempt, step=origin.step,
                path=str(manifest.place or catalog.step_directory(storage.where, origin.step)), seconds=self.seconds,
                bytes=manifest.bytes, metrics=dict(manifest.origin.metrics), emergency=storage is self._refuge,
            )
        )  # fmt: skip
        return True

    async def _prune(self, storage: CheckpointStorage) -> None:
        def work() -> list[int]:
            records = storage.records()
            protected = {self._good} if self._good is not None else set()
            proven = [
                record.step
                for record in records
                if self.proven is not None and record.problem is None and record.step <= self.proven
            ]
            doomed = to_remove(records, self._policy, protected | {max(proven, default=-1)})
            removed = [record for record in records if record.step in doomed and record.problem is None]
            for record in removed:
                storage.remove(record)
            return [record.step for record in removed]

        try:
            removed = await in_thread(work)
        except (EverstepError, OSError) as error:
            self._report(f"old checkpoints could not be removed: {error}")
            return
        if removed and storage is self._storage:
            self._fact(CheckpointsPruned(time=clock.now(), steps=tuple(sorted(removed))))
