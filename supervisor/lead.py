"""What the leader of a job on several nodes does beside its own node's work: it turns what the nodes report into one order.

The node supervisor that leads decides as it does alone (``node``): when to save, when to stop, what an end means. Here is what makes
that hold for all nodes: the ends on all of them, the parts of a checkpoint, the standby that all have ready; in ``roster`` who takes part,
in ``rounds`` the agreed saves. Decisions are ``decide``'s; facts come from the reports; the only thing that goes out is the order (``orders``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Final

from supervisor.attempt import Attempt
from supervisor.checkpoint.manifest import Origin as CheckpointOrigin
from supervisor.config import Options
from supervisor.decide import straggler
from supervisor.decide.causes import Departed
from supervisor.decide.fencing import Isolation
from supervisor.decide.membership import Size
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.edge.store.protocol import Store
from supervisor.errors import LeadershipLostError, StorageError
from supervisor.fleet import (
    Assignment,
    Course,
    DrainOrder,
    Ended,
    Holder,
    Member,
    Notice,
    Order,
    Origin,
    Proposal,
    Release,
    Report,
)
from supervisor.fleet import Final as FinalOrder
from supervisor.joining import Joining
from supervisor.ledger import Ledger
from supervisor.model import ProposalFlag, StopCause, StopRequested, Tier
from supervisor.ordered_copies import Copying
from supervisor.ordered_standby import OrderedStandby
from supervisor.orders import Orders
from supervisor.probing import Probing
from supervisor.resume import Resume
from supervisor.roster import Roster
from supervisor.rounds import Rounds
from supervisor.shared_snapshots import Age, SharedSnapshots
from supervisor.solitude import Solitude

ENDING: Final = 75.0  # seconds that a node may take to end an attempt
LEAVING: Final = 10.0  # seconds that nodes may take to leave in the end


class Lead:
    """Of one run. ``start`` it; then ``begin``, ``collect`` for each attempt, and ``finish``."""

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
        self._ledger, self._snapshots = ledger, snapshots
        before = joining.order
        first = Order(
            serial=(before.serial if before else 0) + 1,
            leader=f"{joining.report.name} {joining.report.life}",
            epoch=epoch,
            run_id=run_id,
            save_every=options.save_every,
            over=ledger.record.attempt if ledger.record.attempt is not None else -1,
        )
        self._orders = Orders(joining, store, first)
        self._orders.on_news = self._think
        self._orders.on_deposed = self._on_deposed
        self._solitude = Solitude(options, console)
        self.roster = Roster(self._orders, options, console, size, before.run if before else None)
        enabled = options.peer_copies == "on"
        self.copying = Copying(self._orders, self.roster, ledger, snapshots, enabled=enabled)
        self.probing = Probing(self._orders)
        self.rounds = Rounds(self._orders, ledger, snapshots, before.proposal if before else Proposal())
        self._attempt: Attempt | None = None
        self.standby = OrderedStandby(self._orders, self.roster, enabled=options.standby != "off")
        self._members: dict[str, Member] = {}  # of the attempt, by name
        self._lost: set[str] = set()
        self._untold: set[str] = set()  # nodes whose news were not looked at yet
        #: told what nodes have said since the last time (None: one is gone), and by the clock
        self.on_reports: Callable[[Mapping[str, Report | None]], None] = lambda _news: None

    # ------------------------------------------------------------------ the run

    def start(self, on_change: Callable[[], None]) -> None:
        """Lead from now on. ``on_change``: the store has another order."""
        self._orders.on_change = on_change
        self._orders.start()

    async def close(self) -> None:
        """Lead no more."""
        await self._orders.close()

    def fence(self) -> None:
        """Raise StorageError unless this node certainly leads: before a commit."""
        self._orders.fence()

    async def finish(self, code: int, reason: str, *, saved: bool) -> None:
        """Let every node leave, and wait a while for them to."""
        self._orders.change(final=FinalOrder(exit_code=code, reason=reason, saved=saved))
        with contextlib.suppress(LeadershipLostError):  # the run is over all the same
            await self._orders.until(
                lambda: all(
                    report.leaving
                    for name, report in self._orders.reports.items()
                    if name != self._orders.own
                ),
                LEAVING,
            )

    def check(self) -> None:
        """Raise LeadershipLostError if this node leads no more."""
        self._orders.check()

    @property
    def order(self) -> Order:
        """As it stands."""
        return self._orders.order

    # ------------------------------------------------------------------ an attempt

    def begin(self, attempt: Attempt, assignment: Assignment) -> None:
        """Have all of its nodes launch it."""
        self._attempt = attempt
        attempt.others = self
        self.rounds.begin(attempt.number, assignment.members)
        self._members = {member.name: member for member in assignment.members}
        self._untold |= self._members.keys()
        self._lost.clear()
        self.standby.begin(attempt.number)
        self.copying.begin()
        self._orders.change(
            run=assignment,
            origin=None,
            slot=None,
            drain=None,
            copy=None,
            standby=None,
            over=max(self._orders.order.over, attempt.number - 1),
            stop=None,
        )

    def held_by_all(self, assignment: Assignment) -> frozenset[Age]:
        """The snapshots of which every node of ``assignment`` has the part that it needs."""
        count = len(assignment.members)
        found: set[Age] | None = None
        for rank, member in enumerate(assignment.members):
            report = self._orders.report(member)
            held = report.held if report is not None else ()
            own = {(one.attempt, one.step) for one in held if (one.node_rank, one.nodes) == (rank, count)}
            found = own if found is None else found & own
        return frozenset(found or ())

    def tell_origin(
        self,
        number: int,
        resume: Resume,
        source: int,
        slot: int,
        holders: tuple[Holder, ...],
        *,
        emergency: bool,
    ) -> None:
        """Where its ranks resume; ``emergency``: from an emergency copy."""
        origin = Origin(
            attempt=number,
            step=resume.step,
            tier=resume.tier,
            path=str(resume.kept) if resume.kept else None,
            emergency=emergency,
            fingerprint=resume.fingerprint,
            source=source,
            slot=slot,
            skips=self._ledger.record.skips,
            holders=holders if resume.tier is Tier.RAM else (),
        )
        self._orders.change(origin=origin)

    def call_off(self) -> None:
        """End the attempt here, for what has happened elsewhere."""
        if self._attempt is not None:
            self._attempt.call_off()

    async def collect(self, number: int, *, wait: bool) -> list[Departed]:
        """How it ended on the other nodes. ``wait``: until they have ended by themselves, as long as none has failed."""
        others = self.roster.others
        if not wait:
            self._orders.change(over=number)
        limit = clock.monotonic() + ENDING

        def all_ended() -> bool:
            nonlocal limit
            ends = [self._ended(member) for member in others]
            failed = self._lost or any(end is not None and end.failure for end in ends)
            if self._orders.order.over < number and failed:
                self._orders.change(over=number)
                limit = clock.monotonic() + ENDING
            missing = [
                m for m, end in zip(others, ends, strict=True) if end is None and m.name not in self._lost
            ]
            if self._orders.order.over >= number and clock.monotonic() > limit:
                self._lost |= {member.name for member in missing}
            return not missing

        await self._orders.until(all_ended)
        self._orders.change(over=number)
        departed = [Departed(name=member.name, ended=self._ended(member)) for member in others]
        self._attempt = None
        return departed

    def stop(self, stop: StopRequested | None) -> None:
        """A stop was asked for, or (None) is not wanted any more."""
        notice = None
        if stop is not None:
            notice = Notice(cause=stop.cause, source=stop.source, deadline=stop.deadline)
        self._orders.change(stop=notice)

    def stop_for(self, why: str) -> None:
        """The attempt is stopped, the job is not."""
        self._orders.change(stop=Notice(cause=StopCause.PREEMPTION, source=why))

    def release(self, members: Collection[Member], *, saved: bool) -> None:
        """Those must leave, and may."""
        before = [one for one in self._orders.order.released if self._orders.report(one.member)]
        released = [Release(member=member, saved=saved) for member in members]
        self._orders.change(released=(*before, *released))

    async def resign(self) -> None:
        """Lead no more, so that another node may at once. Raises LeadershipLostError."""
        await self._orders.resign()

    # ------------------------------------------------------------------ what the nodes say

    def _course(self, member: Member) -> Course | None:
        report, attempt = self._orders.report(member), self._attempt
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
        courses = [self._course(member) for member in self.roster.others]
        return all(course is not None and course.in_session for course in courses)

    @property
    def steps(self) -> list[int]:
        """Completed steps, of the slowest and of the fastest rank of each other node that is still at it."""
        courses = [self._course(member) for member in self.roster.others]
        courses = [course for course in courses if course is None or course.ended is None]
        return [step for course in courses for step in ((course.first, course.last) if course else (0, 0))]

    @property
    def first_step_times(self) -> list[float | None]:
        """When the last rank of each other node completed its first step."""
        courses = [self._course(member) for member in self.roster.others]
        return [course.first_step_time if course else None for course in courses]

    @property
    def own_shares(self) -> dict[int, float]:
        """Of the ranks of the other nodes, where they are known."""
        found: dict[int, float] = {}
        for number, member in enumerate(self.roster.members):
            course = None if member.name == self._orders.own else self._course(member)
            if course is not None:
                found |= straggler.from_percents(course.shares, number * len(course.shares))
        return found

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of all nodes of the attempt, by rank."""
        return self.roster.names

    def _on_deposed(self) -> None:
        self._ledger.silence()  # the journal is another's now
        self.call_off()

    def _think(self, names: Collection[str] = ()) -> None:
        """Look at what these nodes have told, and at the clock."""
        self._untold.update(names)
        if self._heed_silence():
            return
        names, self._untold = self._untold, set()
        self.on_reports({name: self._orders.reports.get(name) for name in names})
        attempt = self._attempt
        if attempt is None:
            return
        members = [self._members[name] for name in names if name in self._members]
        self._heed_ends(attempt, members)
        if not attempt.ended.is_set():
            self.rounds.think({member: self._course(member) for member in members})
            self.copying.think()
            self.standby.think(members)

    def _heed_silence(self) -> bool:
        """Whether there is nothing to think about, as the store is not reached."""
        match self._solitude.look(
            self._orders.silent,
            self._orders.problem,
            self._attempt,
            stopping=self._orders.order.stop is not None,
        ):
            case Isolation.END:
                self.call_off()
            case Isolation.LEAVE:
                self._orders.depose(f"the store was not reached for {self._orders.silent:.0f} s")
            case Isolation.GO_ON:
                pass
        return self._solitude.is_alone

    def _heed_ends(self, attempt: Attempt, members: Collection[Member]) -> None:
        for member in members:
            if member.name == self._orders.own:
                continue
            if self._orders.report(member) is None and member.name not in self._lost:
                self._lost.add(member.name)
            course = self._course(member)
            ended = course.ended if course is not None else None
            is_ending = course is not None and course.ending
            if member.name in self._lost or is_ending or (ended is not None and not ended.finished):
                attempt.call_off()

    def want(self, flags: ProposalFlag) -> None:
        """Have all ranks save soon, at one step."""
        self.rounds.want(flags)
        self._think()

    # ------------------------------------------------------------------ a checkpoint

    async def gather(self, origin: CheckpointOrigin, bandwidth: float | None, *, emergency: bool) -> None:
        """Have every node make its part durable. Raises StorageError."""
        run = self._orders.order.run
        members = run.members if run is not None else ()
        serial = self._orders.next_serial()
        step = origin.step
        self._orders.change(
            drain=DrainOrder(
                serial=serial,
                attempt=origin.attempt,
                step=step,
                bandwidth=bandwidth,
                world_size=origin.world_size,
                created=origin.created,
                metrics=dict(origin.metrics),
                emergency=emergency,
            )
        )
        problem: str | None = None

        def done() -> bool:
            nonlocal problem
            missing = 0
            for member in members:
                report = self._orders.report(member)
                if report is None:
                    problem = f"node {member.name} was lost before its part of step {step} was durable"
                elif report.part is None or report.part.serial != serial:
                    missing += 1
                elif report.part.reason is not None:
                    problem = f"node {member.name}: {report.part.reason}"
            return problem is not None or not missing

        try:
            await self._orders.until(done)
        except LeadershipLostError as error:
            raise StorageError(str(error)) from None
        if problem is not None:
            raise StorageError(problem)

    def gathered(self) -> None:
        """No part is wanted any more."""
        if self._orders.order.drain is not None:
            self._orders.change(drain=None)
