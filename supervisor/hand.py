"""What a node does for an attempt that runs on several: it carries out the order as it stands, and keeps its report true.

The leader's node has a hand like any other: the leader learns of its own ranks by the report that its hand gives. An order is a state, so
all of it is looked at each time; what was carried out before is known by its serial.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from supervisor import background, shares
from supervisor.attempt import Attempt
from supervisor.checkpoint.directory import payload
from supervisor.checkpoint.in_parts import Making
from supervisor.checkpoint.manifest import METADATA_NAME, Origin
from supervisor.checkpoint.slots import is_copy_file
from supervisor.checkpoint.storage import Owner
from supervisor.decide import reach, savepoint, straggler
from supervisor.decide.agreement import Duty, Posted, duty
from supervisor.edge import clock
from supervisor.edge.control import Word
from supervisor.edge.ports import ReservedPort
from supervisor.edge.threads import in_thread
from supervisor.errors import EverstepError
from supervisor.fleet import Answer, Assignment, Course, DrainOrder, Ended, Order, Part, Proposal, Saved
from supervisor.joining import Joining
from supervisor.model import ProposalState
from supervisor.part_places import PartPlaces
from supervisor.peer_copies import PeerCopies
from supervisor.program import Rendezvous
from supervisor.shared_snapshots import SharedSnapshots

STEPS_PERIOD: Final = 0.25  # seconds between two reports that differ by the ranks' steps alone, at least
SHARES_PERIOD: Final = 2.0  # seconds between two looks at the ranks' own time, which are told with the steps
PROBE: Final = 3.0  # seconds that another node's host may take to answer
PROBES: Final = 64  # other nodes that are tried
REPORTS: Final = 2000  # of all nodes together in a second, of that kind


class Hand:
    """One node's. ``places`` are where checkpoints are put together."""

    def __init__(
        self,
        joining: Joining,
        snapshots: SharedSnapshots,
        places: PartPlaces,
        say: Callable[[str], None],
        copies: PeerCopies,
    ) -> None:
        self.copies = copies
        copies.told = self.tell
        self._joining, self._snapshots, self._places = joining, snapshots, places
        self._say = say
        self.attempt: Attempt | None = None
        self._ended: Ended | None = None
        self._saved: Saved | None = None
        self._request: int | None = None
        self._standing: dict[int, int] = {}  # rank → the step that it waits at
        self._posted = Posted()
        self._answer = Answer()
        self._slot = 0  # serial of the newest that was made ready (negative: that could not be)
        self._drain: int = 0
        self._part: Part | None = None
        self._cancelled = threading.Event()
        self._draining: asyncio.Task[None] | None = None
        self._probe = self._probed = 0
        self._unreached: tuple[str, ...] = ()
        self._probing: asyncio.Task[None] | None = None
        self._told_at = 0.0
        self._shares: tuple[int, ...] = ()
        self._shares_at = 0.0
        self._address = joining.report.address
        self._port = ReservedPort(self._address)
        self._in_use: dict[int, ReservedPort] = {}  # by attempt
        self.tell()

    # ------------------------------------------------------------------ an attempt

    def meeting(self, assignment: Assignment) -> Rendezvous:
        """Where its ranks meet, as this node's torchrun is told; the port is held until ``over``."""
        rank = self._rank_in(assignment)
        if assignment.port == self._port.number and assignment.address == self._address:
            self._in_use[assignment.attempt] = self._port
            self._port = ReservedPort(self._address)
            self.tell()
        return Rendezvous(
            address=assignment.address,
            port=assignment.port,
            nodes=len(assignment.members),
            node_rank=rank or 0,
        )

    def begin(self, attempt: Attempt) -> None:
        """It is this one's turn."""
        self.attempt, self._ended, self._saved, self._request = attempt, None, None, None
        self._shares, self._shares_at = (), 0.0
        self._standing.clear()
        self.mind(ready=0)
        self.tell()

    def over(self, ended: Ended) -> None:
        """No process of it is left here."""
        self._ended = ended
        if self.attempt is not None and (port := self._in_use.pop(self.attempt.number, None)) is not None:
            port.release()
        self.tell()

    def saved(self, saved: Saved) -> None:
        """This node's part of a save is whole, or has failed."""
        self._saved = saved
        self.tell()

    def request(self, step: int) -> None:
        """A rank asks for a checkpoint."""
        self._request = step
        self.tell()

    def standing(self, rank: int, step: int) -> None:
        """A rank waits at ``step`` for the verdict."""
        self._standing[rank] = step

    # ------------------------------------------------------------------ the order

    def heed(self) -> None:
        """Carry out what is new in the order."""
        order = self._joining.in_force
        if order is None:
            return
        self._heed_proposal(order.proposal)
        self._heed_slot(order)
        self._heed_drain(order)
        self._heed_copy(order)
        self._heed_probe(order)

    def _heed_proposal(self, proposal: Proposal) -> None:
        attempt = self.attempt
        if attempt is None or self._ended is not None or attempt.ended.is_set():
            return
        match duty(self._posted, proposal, attempt.number):
            case Duty.ANSWER:
                confirmed = self._post(attempt, proposal)
                self._answer = Answer(serial=proposal.serial, confirmed=confirmed)
                self.tell()
            case Duty.COMMIT:
                self._publish(attempt, proposal.serial, ProposalState.COMMITTED)
            case Duty.ABORT:
                self._publish(attempt, proposal.serial, ProposalState.ABORTED)
            case Duty.NOTHING:
                pass

    def _post(self, attempt: Attempt, proposal: Proposal) -> bool:
        """Write it on all pages, and look whether a rank here has passed the step."""
        seats = list(attempt.seats.values())
        for seat in seats:
            seat.page[Word.PROPOSAL_STEP], seat.page[Word.PROPOSAL_FLAGS] = proposal.step, proposal.flags
        self._publish(attempt, proposal.serial, ProposalState.PROPOSED)
        clock.pause(savepoint.SETTLE_SECONDS)
        waiting = {i for i, seat in enumerate(seats) if self._standing.get(seat.rank) == proposal.step}
        steps = [seat.step for seat in seats]
        confirmed = (
            attempt.is_in_session_here
            and savepoint.judge(proposal.step, steps, waiting) is ProposalState.COMMITTED
        )
        if not confirmed:
            self._publish(attempt, proposal.serial, ProposalState.ABORTED)
        return confirmed

    def _publish(self, attempt: Attempt, serial: int, state: ProposalState) -> None:
        self._posted = Posted(serial=serial, state=state)
        for seat in attempt.seats.values():
            seat.page[Word.PROPOSAL] = savepoint.word(serial, state)

    def _heed_slot(self, order: Order) -> None:
        slot, attempt = order.slot, self.attempt
        if slot is None or attempt is None or self._ended is not None:
            return
        if order.run is None or order.run.attempt != attempt.number:
            return  # what lies in that slot may be what this attempt resumes from
        if slot.serial > abs(self._slot):
            self._slot = slot.serial if self._snapshots.prepare(slot.index) else -slot.serial
            self.tell()
        if slot.offered and slot.serial == self._slot:
            self._snapshots.open(slot.index)
            attempt.offer_slot(self._snapshots.offer_word)

    def _heed_copy(self, order: Order) -> None:
        if order.copy is None or order.run is None or order.copy.serial <= self.copies.begun:
            return
        if (rank := self._rank_in(order.run)) is not None:
            self.copies.heed(order.copy, order.run.holder((rank - 1) % len(order.run.members)))

    def _rank_in(self, assignment: Assignment) -> int | None:
        report = self._joining.report
        return assignment.rank_of(report.name, report.life)

    def _heed_probe(self, order: Order) -> None:
        run = order.run
        if order.probe <= self._probe or run is None or (rank := self._rank_in(run)) is None:
            return
        self._probe = order.probe
        if self._probing is not None:
            self._probing.cancel()
        self._probing = background.start(self._try_to_reach(order.probe, run, rank))

    async def _try_to_reach(self, serial: int, run: Assignment, rank: int) -> None:
        holders = [run.holder(other) for other in reach.asked(rank, len(run.members), PROBES)]
        reached = await asyncio.gather(*(self.copies.reaches(holder, PROBE) for holder in holders))
        found = [holder.name for holder, is_there in zip(holders, reached, strict=True) if not is_there]
        self._probed, self._unreached = serial, tuple(found)
        self.tell()

    # ------------------------------------------------------------------ its part of a checkpoint

    def _heed_drain(self, order: Order) -> None:
        drain = order.drain
        if drain is None or drain.serial <= self._drain:
            if drain is None and self._draining is not None:
                self._cancelled.set()
            return
        self._drain = drain.serial
        self._cancelled.set()
        self._cancelled = threading.Event()
        if order.run is not None and (rank := self._rank_in(order.run)) is not None:
            self._draining = background.start(self._write_part(order, drain, rank, len(order.run.members)))

    async def _write_part(self, order: Order, drain: DrainOrder, rank: int, nodes: int) -> None:
        cancelled, age = self._cancelled, (drain.attempt, drain.step)
        reason = None
        slot = self._snapshots.find(age)
        if slot is None:
            reason = f"the snapshot of step {drain.step} is not here any more"
        else:
            folder = self._snapshots.folder(slot)
            self._snapshots.work_on(age)
            try:
                origin = Origin(
                    step=drain.step, attempt=drain.attempt, epoch=order.epoch, run_id=order.run_id,
                    world_size=drain.world_size, created=drain.created, metrics=drain.metrics,
                )  # fmt: skip
                place = self._places.of(Owner(order.run_id, order.epoch), emergency=drain.emergency)
                making = Making(step=drain.step, attempt=drain.attempt, epoch=order.epoch)
                names = [
                    name
                    for name in payload(folder)
                    if not is_copy_file(name) and (rank == 0 or name != METADATA_NAME)
                ]
                await in_thread(
                    partial(
                        place.drain_part, folder, making, names, rank=rank, nodes=nodes, origin=origin,
                        bandwidth=drain.bandwidth,
                        cancelled=cancelled.is_set,
                    )
                )  # fmt: skip
            except (EverstepError, OSError) as error:
                reason = str(error)
            finally:
                if self._drain == drain.serial:  # else the next one is at work
                    self._snapshots.work_on(None)
        if not cancelled.is_set():
            self._part = Part(serial=drain.serial, reason=reason)
            self.tell()

    # ------------------------------------------------------------------ the report

    def beat(self) -> None:
        """By the clock: the order may ask for what could not be done before, and steps are made."""
        self.heed()
        now = clock.monotonic()
        nodes = self.attempt.nodes if self.attempt is not None else 1
        if now - self._told_at >= max(STEPS_PERIOD, nodes / REPORTS):
            self.tell()

    def tell(self) -> None:
        """Report how it stands now."""
        self._told_at = clock.monotonic()
        order = self._joining.order
        self._joining.tell(
            replace(
                self._joining.report,
                port=self._port.number,
                seen=order.serial if order is not None else 0,
                course=self._course(),
                answer=self._answer,
                prepared=self._slot,
                held=self._snapshots.held + self.copies.held,
                shown=self.copies.port,
                copied=self.copies.copied,
                part=self._part,
                probed=self._probed,
                unreached=self._unreached,
            )
        )

    def _course(self) -> Course | None:
        attempt = self.attempt
        if attempt is None:
            return None
        if self._ended is not None:
            return Course(
                attempt=attempt.number, world_size=attempt.world_size, saved=self._saved, ended=self._ended
            )
        steps = [seat.step for seat in attempt.seats.values()]
        times = [seat.page[Word.FIRST_STEP_NS] for seat in attempt.seats.values()]
        is_full = attempt.is_full
        return Course(
            attempt=attempt.number,
            world_size=attempt.world_size if is_full else None,
            in_session=attempt.is_in_session_here,
            has_session=attempt.has_session,
            first=min(steps, default=0) if is_full else 0,
            last=max(steps, default=0),
            total_steps=attempt.total_steps,
            first_step_time=clock.unix_of(max(times)) if is_full and all(times) else None,
            restore_seconds=attempt.restore_seconds,
            request=self._request,
            saved=self._saved,
            metrics=dict(attempt.metrics),
            shares=self._own_shares(attempt),
            ending=attempt.ended.is_set() and not attempt.finished,
        )

    def _own_shares(self, attempt: Attempt) -> tuple[int, ...]:
        now = clock.monotonic()
        if attempt.is_full and now - self._shares_at >= SHARES_PERIOD:
            self._shares_at = now
            known = shares.here(attempt)
            self._shares = straggler.percents([known.get(rank) for rank in sorted(attempt.seats)])
        return self._shares

    def mind(self, **changes: object) -> None:
        """Report something else of this node."""
        self._joining.tell(replace(self._joining.report, **changes))  # type: ignore[arg-type]

    async def close(self) -> None:
        """Let go of ports, and of a part that is being written."""
        self._cancelled.set()
        for work in (self._draining, self._probing):
            if work is not None:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
        await self.copies.close()
        for port in (self._port, *self._in_use.values()):
            port.release()
