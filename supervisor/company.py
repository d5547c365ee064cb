"""The node supervisor that leads a job on several nodes, and what it has of them: the lead, its own hand, and what goes between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from supervisor import background
from supervisor.attempt import Attempt
from supervisor.checkpoint import slots
from supervisor.checkpoint.in_parts import Making, PartStorage
from supervisor.checkpoint.manifest import Key, Manifest, Origin
from supervisor.checkpoint.storage import CheckpointStorage, Owner
from supervisor.config import Options
from supervisor.decide.causes import Cause, Departed, first_cause
from supervisor.decide.membership import Size
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.edge.jobdir import JobDirectory
from supervisor.edge.store.protocol import Store
from supervisor.errors import CancelledError, EverstepError
from supervisor.fleet import Assignment, Ended, Holder
from supervisor.hand import Hand
from supervisor.joining import Joining
from supervisor.lead import Lead
from supervisor.ledger import Ledger
from supervisor.model import Failure
from supervisor.part_places import PartPlaces
from supervisor.peer_copies import PeerCopies
from supervisor.program import Rendezvous
from supervisor.resume import Resume
from supervisor.saves import LeaderSaves
from supervisor.shared_snapshots import Age, SharedSnapshots

_LOOK: Final = 0.2  # seconds between two looks whether a drain is still wanted
BEAT: Final = 0.1


@dataclass(frozen=True)
class Team:
    """A place among the nodes of a job."""

    joining: Joining
    store: Store
    size: Size
    is_embedded: bool  # only the node that serves the store can lead
    secret: bytes = field(repr=False)


def peer_copies(
    team: Team, options: Options, runtime: Path, snapshots: SharedSnapshots, key: Key | None, console: Console
) -> PeerCopies:
    """This node's."""
    return PeerCopies(
        runtime, team.secret, key, snapshots, address=team.joining.report.address, bandwidth=options.peer_bandwidth,
        say=console.say,
    )  # fmt: skip


class Company:
    """Used by the node from the loop's thread, but for ``drain``."""

    def __init__(
        self,
        team: Team,
        options: Options,
        job: JobDirectory,
        ledger: Ledger,
        console: Console,
        snapshots: SharedSnapshots,
        key: Key | None,
        *,
        epoch: int,
        run_id: str,
        runtime: Path,
    ) -> None:
        self.joining = team.joining
        self._snapshots, self._key = snapshots, key
        self._places = PartPlaces.asked_for(options, job, key)
        self._emergency = job.path / "checkpoints"
        self.lead = Lead(
            team.joining,
            team.store,
            options,
            ledger,
            console,
            snapshots,
            size=team.size,
            epoch=epoch,
            run_id=run_id,
        )
        self.copies = peer_copies(team, options, runtime, snapshots, key, console)
        self.hand = Hand(
            team.joining,
            snapshots,
            self._places,
            console.say,
            self.copies,
        )
        self._holders: tuple[Holder, ...] = ()
        self._failed: list[tuple[PartStorage, Making]] = []  # drains that left what is of no use
        self.saves = LeaderSaves(self.hand, snapshots, self.lead)
        self.console, self._lease = console, options.lease
        #: whether another node can lead
        self.others_lead = not team.is_embedded
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        #: what is to be done about a standby that is ordered, or (None) not wanted
        self.on_standby: Callable[[Assignment | None], None] = lambda _standby: None

    async def start(self) -> None:
        """Lead from now on."""
        self._loop = asyncio.get_running_loop()
        await self.copies.start()
        self.lead.start(self._on_order)
        self._tasks = [background.start(work()) for work in (self._listen, self._beat)]

    async def close(self) -> None:
        """Lead no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.lead.close()
        await self.hand.close()

    async def _listen(self) -> None:
        while True:
            self.joining.changed.clear()
            self._on_order()
            await self.joining.changed.wait()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            self.hand.beat()

    def _on_order(self) -> None:
        self.hand.heed()
        order = self.joining.in_force
        self.on_standby(order.standby if order is not None else None)

    # ------------------------------------------------------------------ attempts

    def begin(self, attempt: Attempt, assignment: Assignment) -> Rendezvous:
        """Have it launched on all of its nodes; where its ranks meet."""
        meeting = self.hand.meeting(assignment)
        self.hand.begin(attempt)
        self.lead.begin(attempt, assignment)
        return meeting

    async def find_state(self, assignment: Assignment, committed: Age | None) -> None:
        """Have here what is newest in the nodes' memory, if that is newer than what was ``committed``; from others where need be."""
        snapshots, self._holders = self._snapshots, ()
        direct = snapshots.whole = self.lead.held_by_all(assignment)
        best = self.lead.copying.best_state(assignment)
        if best is None or max(direct, default=(-1, -1)) >= best[0] or (committed or (-1, -1)) >= best[0]:
            return
        age, holders = best
        rank, nodes = assignment.names.index(self.joining.report.name), len(assignment.members)
        try:
            if holders[0].nodes == nodes:
                slot = snapshots.find(age, (rank, nodes))
                slot = snapshots.next_slot(None) if slot is None else slot
                await self.copies.bring_part(age, rank, nodes, holders, slot or 0)
                snapshots.whole = direct | {age}
            else:
                snapshots.use(
                    self.copies.assembled, await self.copies.assemble(age, holders), self.copies.clear
                )
        except (EverstepError, OSError) as error:
            self.console.say(f"step {age[1]} is in the nodes' memory, and cannot be had from there: {error}")
            return
        self._holders = holders
        self.console.say(
            f"step {age[1]} comes from the memory of {', '.join(sorted({one.name for one in holders}))}"
        )

    def tell_origin(self, number: int, resume: Resume) -> None:
        """Where its ranks resume, on all nodes alike."""
        newest = self._snapshots.newest()
        source, slot = -1, -1
        if newest is not None:
            source = newest[1].attempt
            slot = self._snapshots.find((newest[1].attempt, newest[1].step)) or 0
        kept = resume.kept
        emergency = isinstance(kept, Path) and kept.parent == self._emergency != self._places.storage.where
        self.lead.tell_origin(number, resume, source, slot, self._holders, emergency=emergency)

    async def end(
        self, attempt: Attempt, own: Failure | None, *, wait: bool, noticed: float | None
    ) -> tuple[Cause, list[Departed]]:
        """Its end on all nodes: the cause, and how it was on each."""
        here = Ended(finished=attempt.finished, completed=attempt.finished, failure=own, noticed=noticed)
        self.hand.over(here)
        departed = await self.lead.collect(attempt.number, wait=wait)
        now = clock.now()
        cause = first_cause(
            [Departed(name=self.joining.report.name, ended=here), *departed], attempt=attempt.number,
            lease=self._lease, now=now,
        )  # fmt: skip
        if cause.node == self.joining.report.name and own is not None:
            cause = replace(cause, failure=own)  # which needs not say where
        return cause, departed

    # ------------------------------------------------------------------ checkpoints

    def drain(
        self,
        storage: CheckpointStorage,
        source: Path,
        origin: Origin,
        *,
        fence: Callable[[], None],
        bandwidth: float | None,
        cancelled: Callable[[], bool],
    ) -> Manifest:
        """As ``CheckpointStorage.drain``, of a snapshot that lies on several nodes. In a thread."""

        def both() -> None:
            self.lead.fence()
            fence()

        record = slots.read_slot(source, self._key)
        if record is None or record.nodes == 1:
            return storage.drain(source, origin, fence=both, bandwidth=bandwidth, cancelled=cancelled)
        assert self._loop is not None
        emergency = storage.where != self._places.storage.where
        place = self._places.of(Owner(origin.run_id, origin.epoch), emergency=emergency)
        making = Making(step=origin.step, attempt=origin.attempt, epoch=origin.epoch)
        if not emergency:  # which must not wait for the storage that fails
            self._discard_failed()
        existing = place.begin(making, fence=both, cancelled=cancelled)
        if existing is not None:
            return existing
        self._failed.append((place, making))
        gathering = self.lead.gather(origin, bandwidth, emergency=emergency)
        work = asyncio.run_coroutine_threadsafe(gathering, self._loop)
        try:
            while True:
                try:
                    work.result(_LOOK)
                    break
                except FutureTimeoutError:
                    if cancelled():
                        work.cancel()
                        raise CancelledError(f"the drain of step {origin.step} was given up") from None
                except FutureCancelledError:
                    raise CancelledError(f"the drain of step {origin.step} was given up") from None
            manifest = place.complete(making, origin, fence=both, cancelled=cancelled)
            self._failed.remove((place, making))
            return manifest
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self.lead.gathered)

    def _discard_failed(self) -> None:
        """Remove what drains that failed have left, now that the storage may answer again; else the next run does."""
        while self._failed:
            place, making = self._failed.pop()
            try:
                place.discard(making)
            except EverstepError as error:
                self.console.say(f"what a failed drain of step {making.step} left stays for now: {error}")
