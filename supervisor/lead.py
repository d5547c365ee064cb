"""What the leader of a job on several nodes does beside its own node's work: it turns what the nodes report into one order.

The node supervisor that leads decides as it does alone (``node``): when to save, when to stop, what an end means. Here is what makes
that hold for all nodes: who is part of an attempt, the agreed saves, the slot that all write next, the parts of a checkpoint, the
standby that all have ready, and the ends on all of them. Decisions are ``decide``'s; facts come from the reports; the only thing that goes out is
the order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from supervisor.attempt import Attempt
from supervisor.checkpoint.manifest import Origin as CheckpointOrigin
from supervisor.config import Options
from supervisor.decide import agreement as agreements
from supervisor.decide import membership
from supervisor.decide.agreement import Agreement, Standing
from supervisor.decide.membership import Present, Size, Suspicions
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.edge.store.protocol import Store
from supervisor.errors import LeadershipLostError, StorageError, StoreError
from supervisor.fleet import (
    Assignment,
    Course,
    DrainOrder,
    Ended,
    Member,
    Notice,
    Order,
    Origin,
    Report,
    SlotOrder,
)
from supervisor.fleet import (
    Final as FinalOrder,
)
from supervisor.joining import AGAIN, Joining, Roll
from supervisor.ledger import Ledger
from supervisor.model import Failure, FailureKind, ProposalFlag, SnapshotCompleted, StopCause, StopRequested
from supervisor.resume import Resume
from supervisor.shared_snapshots import Age, SharedSnapshots

BEAT: Final = 0.1  # seconds between two looks when nothing is heard
LOOK: Final = 10.0  # seconds of one wait for reports
ENDING: Final = 75.0  # seconds that a node may take to end an attempt
LEAVING: Final = 10.0  # seconds that nodes may take to leave in the end
SAID_AFTER: Final = 3.0  # seconds of waiting for nodes until that is said
STANDBY_DELAY: Final = 2.0  # seconds after the first step
STANDBY_TRIES: Final = 3


@dataclass(frozen=True)
class Departed:
    """How an attempt ended on a node; ``ended`` None: the node was lost."""

    name: str
    ended: Ended | None


class Lead:
    """Of one run. ``start`` it; then ``muster``, ``begin``, ``collect`` for each attempt, and ``finish``."""

    def __init__(
        self,
        joining: Joining,
        store: Store,
        options: Options,
        ledger: Ledger,
        console: Console,
        snapshots: SharedSnapshots,
        *,
        size: Size,
        epoch: int,
        run_id: str,
    ) -> None:
        self._joining, self._options, self._ledger, self._console = joining, options, ledger, console
        self._snapshots, self._size = snapshots, size
        self._roll = Roll(store)
        before = joining.order
        self._order = Order(
            serial=(before.serial if before else 0) + 1,
            leader=f"{joining.report.name} {joining.report.life}",
            epoch=epoch,
            run_id=run_id,
            job="",
            save_every=options.save_every,
            over=ledger.record.attempt if ledger.record.attempt is not None else -1,
        )
        self._first = self._order.serial
        self._previous: Sequence[str] = before.run.names if before and before.run else ()
        self._suspicions = Suspicions()
        self._since: dict[Member, float] = {}  # when a node was first seen
        self._assignment: Assignment | None = None
        self._attempt: Attempt | None = None
        self._agreement = Agreement(attempt=-1)
        if before is not None:
            self._agreement = replace(self._agreement, proposal=before.proposal)
        self._settled: set[tuple[int, int]] = (
            set()
        )  # saves of this attempt that are whole or have failed, by step and slot
        self._slot_done = True
        self._failed_slot: int | None = None
        self._serial = max(before.drain.serial if before and before.drain else 0, self._order.serial)
        self._requests: dict[str, int] = {}
        self._standby_at: float | None = None
        self._standby_tries = 0
        self._lost: set[str] = set()
        self._notices: set[Member] = set()
        self._dirty = asyncio.Event()
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.rate: float | None = None  # steps a second
        self.deposed = False
        self.on_saved: Callable[[int, ProposalFlag], None] = lambda _step, _flags: None
        self.on_notice: Callable[[str, Notice], None] = lambda _name, _notice: None
        self.on_change: Callable[[], None] = lambda: None  # of the order
        self.on_deposed: Callable[[], None] = lambda: None
        self.may_grow: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------ the run

    def start(self) -> None:
        """Lead from now on."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work()) for work in (self._watch, self._publish, self._beat)]
        self._dirty.set()

    async def close(self) -> None:
        """Lead no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def finish(self, code: int, reason: str, *, saved: bool) -> None:
        """Let every node leave, and wait a while for them to."""
        self._change(final=FinalOrder(exit_code=code, reason=reason, saved=saved))
        await self._until(
            lambda: all(report.leaving for name, report in self._roll.reports.items() if name != self._own),
            LEAVING,
        )

    def fence(self) -> None:
        """Raise StorageError unless this node certainly leads: before a commit."""
        if self.deposed or not self._joining.leads:
            raise StorageError("this node does not lead any more: it must not commit")

    @property
    def _own(self) -> str:
        return self._joining.report.name

    @property
    def order(self) -> Order:
        """As it is to be."""
        return self._order

    def _change(self, **changes: Any) -> None:
        self._order = replace(self._order, serial=self._order.serial + 1, **changes)
        self._dirty.set()

    async def _publish(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            order = self._order
            try:
                if not await self._joining.command(order):
                    self._depose()
                    return
            except StoreError:
                self._dirty.set()
                await asyncio.sleep(AGAIN)
                continue
            self.on_change()

    def _depose(self) -> None:
        self.deposed = True
        self._news.set()
        self.on_deposed()
        self.call_off()

    async def _watch(self) -> None:
        while True:
            try:
                await self._roll.look(LOOK)
            except StoreError:
                await asyncio.sleep(AGAIN)
                continue
            self._think()
            self._news.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            tenure = self._joining.tenure
            if tenure is None or not tenure.holds(clock.monotonic()) or not self._joining.leads:
                self._depose()
                return
            self._think()

    async def _until(self, holds: Callable[[], bool], seconds: float = float("inf")) -> bool:
        deadline = clock.monotonic() + seconds
        while not holds():
            if self.deposed:
                raise LeadershipLostError("another node leads the job now")
            self._news.clear()
            left = deadline - clock.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), min(left, 1.0))
        return True

    # ------------------------------------------------------------------ who takes part

    async def muster(self, number: int) -> Assignment | None:
        """The nodes of attempt ``number``, as soon as there are enough; None when there were too few for --node-timeout."""
        began, said = clock.monotonic(), False
        first = self._assignment is None

        def found() -> tuple[Member, ...] | None:
            nonlocal said
            now, waited = clock.monotonic(), clock.monotonic() - began
            present, excluded = self._present(), self._excluded()
            members = None
            if not first or membership.may_start(present, self._size, excluded, now):
                members = membership.choose(present, self._size, previous=self._previous, excluded=excluded)
            if members is None and waited > SAID_AFTER and not said:
                said = True
                missing = self._size.least - len(present)
                more = f"{missing} more node{'s' if missing != 1 else ''}" if missing > 0 else "more nodes"
                self._console.say(
                    f"waiting for {more}: {', '.join(sorted(p.member.name for p in present))} here"
                )
            return self._with_own(members)

        chosen: tuple[Member, ...] | None = None

        def enough() -> bool:
            nonlocal chosen
            chosen = found()
            return chosen is not None

        if not await self._until(enough, self._options.node_timeout):
            return None
        assert chosen is not None
        host = self._roll.reports[chosen[0].name]
        assignment = Assignment(attempt=number, members=chosen, address=host.address, port=host.port)
        standby = self._order.standby
        if (
            standby is not None
            and standby.attempt == number
            and standby.members == chosen
            and self._all_ready(standby)
        ):
            assignment = standby
        self._assignment, self._previous = assignment, assignment.names
        return assignment

    def _present(self) -> list[Present]:
        found = []
        now = clock.monotonic()
        for report in self._roll.reports.values():
            member = Member(name=report.name, life=report.life)
            since = self._since.setdefault(member, now)
            busy = (
                report.course is not None
                and report.course.ended is None
                and report.course.attempt <= self._order.over
            )
            heard = report.seen >= self._first
            if heard and not report.leaving and report.notice is None and not busy:
                found.append(Present(member=member, rank=report.rank, since=since))
        return found

    def _excluded(self) -> frozenset[str]:
        return self._suspicions.excluded_at(clock.now()) - {self._own}

    def _with_own(self, members: tuple[Member, ...] | None) -> tuple[Member, ...] | None:
        """The leader takes part itself; with more spare nodes than places, in the place of the last."""
        own = Member(name=self._own, life=self._joining.report.life)
        if members is None or own in members:
            return members
        if self._own not in self._roll.reports:
            return None
        return (*members[:-1], own)

    def blame(self, name: str | None, *, progressed: bool) -> None:
        """An attempt has failed, first there."""
        before = self._excluded()
        self._suspicions = membership.blame(self._suspicions, name, progressed=progressed, now=clock.now())
        for bad in sorted(self._excluded() - before):
            exclusion = self._suspicions.excluded[bad]
            self._console.say(
                f"node {bad} is left out for {exclusion.seconds / 60:.0f} minutes: {exclusion.reason}"
            )

    def should_grow(self, running: float) -> bool:
        """Whether there are nodes that an attempt, which has made steps for ``running`` seconds, should be stopped for."""
        if self._assignment is None or self._size.least == self._size.most:
            return False
        return membership.should_grow(
            self._present(),
            self._assignment.members,
            self._size,
            excluded=self._excluded(),
            running=running,
            now=clock.monotonic(),
        )

    def newcomers(self) -> list[str]:
        """Nodes that wait to take part."""
        members = self._assignment.names if self._assignment else ()
        return sorted(one.member.name for one in self._present() if one.member.name not in members)

    def may_shrink(self, name: str) -> bool:
        """Whether an attempt without that node would be another one: it is part of this one, and not the leader."""
        return (
            self._size.least < self._size.most
            and name != self._own
            and name in (self._assignment.names if self._assignment else ())
        )

    def without(self, names: set[str]) -> bool:
        """Whether the job can go on without those nodes."""
        return len([one for one in self._present() if one.member.name not in names]) >= self._size.least

    # ------------------------------------------------------------------ an attempt

    def begin(self, attempt: Attempt, assignment: Assignment) -> None:
        """Have all of its nodes launch it."""
        self._attempt = attempt
        attempt.others = self
        self._agreement = Agreement(attempt=attempt.number, proposal=self._agreement.proposal)
        self._settled.clear()
        self._requests.clear()
        self._lost.clear()
        self._slot_done, self._failed_slot = True, None
        self._standby_at, self._standby_tries = None, 0
        self._snapshots.whole = self.held_by_all(assignment)
        self._change(
            run=assignment,
            origin=None,
            slot=None,
            drain=None,
            standby=None,
            over=max(self._order.over, attempt.number - 1),
            stop=None,
        )

    def held_by_all(self, assignment: Assignment) -> frozenset[Age]:
        """The snapshots of which every node of ``assignment`` has the part that it needs."""
        count = len(assignment.members)
        found: set[Age] | None = None
        for rank, member in enumerate(assignment.members):
            report = self._report(member)
            held = report.held if report is not None else ()
            own = {(one.attempt, one.step) for one in held if (one.node_rank, one.nodes) == (rank, count)}
            found = own if found is None else found & own
        return frozenset(found or ())

    def tell_origin(self, number: int, resume: Resume, source: int, slot: int) -> None:
        """Where its ranks resume."""
        origin = Origin(
            attempt=number,
            step=resume.step,
            tier=resume.tier,
            path=str(resume.kept) if resume.kept else None,
            source=source,
            slot=slot,
            skips=self._ledger.record.skips,
        )
        self._change(origin=origin)

    def cold(self, assignment: Assignment) -> Assignment:
        """Not with the standby, where nodes may be waiting already: at another port of the same host."""
        host = self._report(assignment.members[0])
        port = host.port if host is not None else assignment.port
        self._assignment = replace(assignment, port=port, standby=0)
        return self._assignment

    def unfinished(self, departed: Sequence[Departed]) -> Failure | None:
        """Somebody has left an attempt that the others were still in, without a failure of its own."""
        for one in departed:
            if one.ended is not None and not one.ended.finished:
                number = self._assignment.attempt if self._assignment else 0
                reason = f"node {one.name} has left the attempt"
                return Failure(kind=FailureKind.NODE_LOST, reason=reason, attempt=number, time=clock.now())
        return None

    def call_off(self) -> None:
        """End the attempt here, for what has happened elsewhere."""
        if self._attempt is not None:
            self._attempt.call_off()

    async def collect(self, number: int, *, wait: bool) -> list[Departed]:
        """How it ended on the other nodes. ``wait``: until they have ended by themselves, as long as none has failed."""
        others = self._others()
        if not wait:
            self._change(over=number)
        limit = clock.monotonic() + ENDING

        def all_ended() -> bool:
            nonlocal limit
            ends = [self._ended(member) for member in others]
            failed = self._lost or any(end is not None and end.failure for end in ends)
            if self._order.over < number and failed:
                self._change(over=number)
                limit = clock.monotonic() + ENDING
            missing = [
                m for m, end in zip(others, ends, strict=True) if end is None and m.name not in self._lost
            ]
            if self._order.over >= number and clock.monotonic() > limit:
                self._lost |= {member.name for member in missing}
            return not missing

        await self._until(all_ended)
        self._change(over=number)
        departed = [Departed(member.name, self._ended(member)) for member in others]
        self._attempt = None
        return departed

    def end_now(self, number: int) -> None:
        """Do not wait for anybody."""
        if self._order.over < number:
            self._change(over=number)

    def stop(self, stop: StopRequested | None) -> None:
        """A stop was asked for, or (None) is not wanted any more."""
        notice = None
        if stop is not None:
            notice = Notice(cause=stop.cause, source=stop.source, deadline=stop.deadline)
        self._change(stop=notice)

    def stop_for(self, why: str) -> None:
        """The attempt is stopped, the job is not."""
        self._change(stop=Notice(cause=StopCause.PREEMPTION, source=why))

    # ------------------------------------------------------------------ what the nodes say

    def _members(self) -> tuple[Member, ...]:
        return self._assignment.members if self._assignment is not None else ()

    def _others(self) -> list[Member]:
        return [member for member in self._members() if member.name != self._own]

    def _report(self, member: Member) -> Report | None:
        report = self._roll.reports.get(member.name)
        return report if report is not None and report.life == member.life else None

    def _course(self, member: Member) -> Course | None:
        report, attempt = self._report(member), self._attempt
        if (
            report is None
            or report.course is None
            or attempt is None
            or report.course.attempt != attempt.number
        ):
            return None
        return report.course

    def _ended(self, member: Member) -> Ended | None:
        course = self._course(member)
        return course.ended if course is not None else None

    @property
    def in_session(self) -> bool:
        """Whether every rank of the other nodes can take part in an agreed save."""
        courses = [self._course(member) for member in self._others()]
        return all(course is not None and course.in_session for course in courses)

    @property
    def steps(self) -> list[int]:
        """Completed steps, of the slowest and of the fastest rank of each other node."""
        courses = [self._course(member) for member in self._others()]
        return [step for course in courses for step in ((course.first, course.last) if course else (0, 0))]

    @property
    def first_step_times(self) -> list[float | None]:
        """When the last rank of each other node completed its first step."""
        courses = [self._course(member) for member in self._others()]
        return [course.first_step_time if course else None for course in courses]

    def _think(self) -> None:
        self._heed_notices()
        attempt = self._attempt
        if attempt is not None:
            self._heed_ends(attempt)
        if attempt is not None and not attempt.ended.is_set():
            self._heed_saves(attempt)
            self._agree(attempt)
            self._choose_slot()
            self._think_of_standby(attempt)

    def _heed_notices(self) -> None:
        for report in list(self._roll.reports.values()):
            member = Member(name=report.name, life=report.life)
            if report.notice is not None and member not in self._notices:
                self._notices.add(member)
                self.on_notice(report.name, report.notice)

    def _heed_ends(self, attempt: Attempt) -> None:
        for member in self._others():
            if self._report(member) is None and member.name not in self._lost:
                self._lost.add(member.name)
            ended = self._ended(member)
            if member.name in self._lost or (ended is not None and not ended.finished):
                attempt.call_off()

    # ------------------------------------------------------------------ agreed saves

    def want(self, flags: ProposalFlag) -> None:
        """Have all ranks save soon, at one step."""
        self._agreement = agreements.want(self._agreement, flags)
        self._think()

    def request(self, step: int) -> None:
        """A rank of this node asks for a checkpoint of that step."""
        self._agreement = agreements.request(self._agreement, step)

    def recall_stop(self) -> bool:
        """Nobody wants a stop any more: whether no rank has heard of it yet."""
        recalled = agreements.recall_stop(self._agreement)
        if recalled is None:
            return False
        self._agreement = recalled
        return True

    @property
    def is_idle(self) -> bool:
        """Whether no save is wanted or under way."""
        return self._agreement.is_idle

    def _agree(self, attempt: Attempt) -> None:
        standings = []
        for member in self._members():
            course, report = self._course(member), self._report(member)
            if course is None or report is None or course.ended is not None:
                standings.append(Standing())
                continue
            if course.request is not None and self._requests.get(member.name) != course.request:
                self._requests[member.name] = course.request
                self._agreement = agreements.request(self._agreement, course.request)
            standings.append(
                Standing(
                    in_session=course.in_session,
                    first=course.first,
                    last=course.last,
                    total_steps=course.total_steps,
                    answer=report.answer,
                )
            )
        now = clock.monotonic()
        self._agreement = agreements.look(
            self._agreement, standings, self.rate, now, self._ledger.record.skips
        )
        if self._agreement.proposal != self._order.proposal:
            self._change(proposal=self._agreement.proposal)

    def _heed_saves(self, attempt: Attempt) -> None:
        courses = [self._course(member) for member in self._members()]
        saves = [course.saved for course in courses if course is not None and course.saved is not None]
        for saved in saves:
            if saved.reason is not None and (saved.step, saved.slot) not in self._settled:
                self._settled.add((saved.step, saved.slot))
                self._agreement = agreements.failed(self._agreement, saved.step)
                self._snapshots.failure = f"the snapshot of step {saved.step} failed: {saved.reason}"
                self._slot_done, self._failed_slot = (
                    True,
                    saved.slot if saved.slot >= 0 else self._failed_slot,
                )
        places = {(saved.step, saved.slot) for saved in saves}
        if len(saves) < len(self._members()) or len(places) != 1 or places <= self._settled:
            return
        if any(saved.reason is not None for saved in saves):
            return
        self._settled |= places
        step = saves[0].step
        self._slot_done, self._failed_slot = True, None
        self._snapshots.tell_whole(
            SnapshotCompleted(
                time=clock.now(),
                attempt=attempt.number,
                step=step,
                seconds=max(saved.seconds for saved in saves),
                bytes=sum(saved.bytes for saved in saves),
            )
        )
        self._agreement, flags = agreements.served(self._agreement, step)
        self.on_saved(step, flags)

    def _choose_slot(self) -> None:
        slot = self._order.slot
        reports = [self._report(member) for member in self._members()]
        refused = slot is not None and any(
            report is not None and report.prepared == -slot.serial for report in reports
        )
        if slot is None or self._slot_done or refused:
            index = self._snapshots.next_slot(
                slot.index if slot is not None and refused else self._failed_slot
            )
            if index is not None:
                self._slot_done = False
                self._serial += 1
                self._change(slot=SlotOrder(serial=self._serial, index=index))
        elif not slot.offered and all(
            report is not None and report.prepared == slot.serial for report in reports
        ):
            self._change(slot=replace(slot, offered=True))

    # ------------------------------------------------------------------ a checkpoint

    async def gather(self, origin: CheckpointOrigin, bandwidth: float | None) -> None:
        """Have every node make its part of a snapshot durable. Raises StorageError."""
        members = self._members()
        self._serial += 1
        serial = self._serial
        step = origin.step
        self._change(
            drain=DrainOrder(
                serial=serial,
                attempt=origin.attempt,
                step=step,
                members=members,
                bandwidth=bandwidth,
                world_size=origin.world_size,
                created=origin.created,
                metrics=dict(origin.metrics),
            )
        )
        problem: str | None = None

        def done() -> bool:
            nonlocal problem
            missing = 0
            for member in members:
                report = self._report(member)
                if report is None:
                    problem = f"node {member.name} was lost before its part of step {step} was durable"
                elif report.part is None or report.part.serial != serial:
                    missing += 1
                elif report.part.reason is not None:
                    problem = f"node {member.name}: {report.part.reason}"
            return problem is not None or not missing

        try:
            await self._until(done)
        except LeadershipLostError as error:
            raise StorageError(str(error)) from None
        if problem is not None:
            raise StorageError(problem)

    def gathered(self) -> None:
        """No part is wanted any more."""
        if self._order.drain is not None:
            self._change(drain=None)

    # ------------------------------------------------------------------ the standby

    def arm_standby(self) -> None:
        """The attempt has made its first step: have the next one made ready on its nodes."""
        if self._options.standby != "off":
            self._standby_at, self._standby_tries = clock.monotonic() + STANDBY_DELAY, STANDBY_TRIES

    def drop_standby(self) -> None:
        """It is not wanted any more."""
        self._standby_at = None
        if self._order.standby is not None:
            self._change(standby=None)

    def _all_ready(self, standby: Assignment) -> bool:
        reports = [self._report(member) for member in standby.members]
        return all(report is not None and report.ready == standby.standby for report in reports)

    def _think_of_standby(self, attempt: Attempt) -> None:
        standby = self._order.standby
        reports = [self._report(member) for member in self._members()]
        if standby is not None and any(
            report is None or report.ready == -standby.standby for report in reports
        ):
            self._change(standby=None)
            again = self._standby_tries > 0 and all(report is not None for report in reports)
            self._standby_at = clock.monotonic() + STANDBY_DELAY if again else None
        elif (
            self._standby_at is not None and clock.monotonic() >= self._standby_at and reports[0] is not None
        ):
            self._standby_at = None
            self._standby_tries -= 1
            self._serial += 1
            host = reports[0]
            self._change(
                standby=Assignment(
                    attempt=attempt.number + 1,
                    members=self._members(),
                    address=host.address,
                    port=host.port,
                    standby=self._serial,
                )
            )

    # ------------------------------------------------------------------ what an end means

    def judge(
        self, own: Failure | None, noticed: float | None, departed: Sequence[Departed]
    ) -> tuple[Failure | None, str | None, float | None]:
        """The first cause among the ends on all nodes, where it was, and when it was noticed."""
        ends: list[tuple[int, float, Failure, str]] = []
        if own is not None:
            ends.append((_order_of(own), noticed or own.time, own, self._own))
        for one in departed:
            if one.ended is None:
                reason = f"node {one.name} was lost: nothing was heard of it for {self._options.lease:g} s"
                number = self._assignment.attempt if self._assignment else 0
                now = clock.now()
                lost = Failure(kind=FailureKind.NODE_LOST, reason=reason, attempt=number, time=now)
                ends.append((_order_of(lost), now, lost, one.name))
            elif one.ended.failure is not None:
                failure = one.ended.failure
                where = f" (on {one.name})"
                failure = replace(failure, reason=failure.reason + where)
                ends.append((_order_of(failure), one.ended.noticed or failure.time, failure, one.name))
        if not ends:
            return None, None, noticed
        first = min(ends, key=lambda end: end[:2])
        return first[2], first[3], min(end[1] for end in ends)


def _order_of(failure: Failure) -> int:
    """A lost connection is an echo of whatever else there was; a node that is gone explains what follows from its silence."""
    match failure.kind:
        case FailureKind.COMMUNICATION:
            return 2
        case FailureKind.NODE_LOST | FailureKind.HANG:
            return 1
        case _:
            return 0
