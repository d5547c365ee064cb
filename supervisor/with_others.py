"""What is different for the node that leads when there are others: between ``node``, which decides, and ``company``, which reaches them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Final

from supervisor import background
from supervisor.attempt import Attempt
from supervisor.checkpoint.location import Location
from supervisor.companions import Companions, Nobody, Outcome, Turn
from supervisor.company import Team
from supervisor.config import Options
from supervisor.decide import reach
from supervisor.decide.causes import unfinished
from supervisor.decide.restart import EXIT_AGAIN
from supervisor.edge import clock
from supervisor.errors import LeadershipLostError, LeadGivenUpError, UsageError
from supervisor.fleet import Assignment, Report
from supervisor.ledger import Ledger
from supervisor.model import Failure, FailureKind, ProposalFlag, RunEnded, StopCause
from supervisor.program import Rendezvous
from supervisor.pulse import Pulse
from supervisor.reshaping import Reshaping
from supervisor.resume import Resume
from supervisor.saves import LeaderSaves
from supervisor.standby import Standby
from supervisor.stopping import Stopping
from supervisor.stores import Stores

#: seconds without a first step after which it is looked whether the nodes reach each other
START: Final = 8.0
LONGEST_START: Final = 120.0  # they double
PERIOD: Final = 1.0  # seconds between two looks for nodes that wait
#: what tells against the node that it happens on
_SUSPICIOUS: Final = frozenset(
    {FailureKind.CRASH, FailureKind.HOST_OOM, FailureKind.CUDA_OOM, FailureKind.DEVICE, FailureKind.LAUNCHER}
)
#: what it looks like when nodes do not reach each other
_MAY_BE_APART: Final = frozenset({FailureKind.HANG, FailureKind.COMMUNICATION})


class WithOthers:
    """Used by the node from the loop's thread."""

    def __init__(
        self, stores: Stores, standby: Standby, stopping: Stopping, ledger: Ledger, *, copies: bool
    ) -> None:
        assert stores.company is not None
        self._stores, self._standby, self._stopping, self._ledger = stores, standby, stopping, ledger
        self._company = stores.company
        self._lead = self._company.lead
        self._roster = self._lead.roster
        self._pulse: Pulse | None = None
        self._attempt: Attempt | None = None
        self._assignment: Assignment | None = None  # its nodes
        self._change = Reshaping(
            self._lead, stopping, stores.company.console, others_lead=stores.company.others_lead
        )
        self._heard: dict[str, Report] = {}  # nodes that have heard of something
        self._apart: tuple[reach.Pair, ...] = ()  # nodes of the attempt that do not reach each other
        self._copies = copies
        self._resumed_from: Location | None = None
        self._standby_serial = 0
        self._looking: asyncio.Task[None] | None = None
        self._lead.rounds.on_saved = self._on_saved
        self._lead.on_reports = self._heed
        self._company.on_standby = self._on_standby
        standby.on_ready = lambda serial: self._company.hand.mind(ready=serial)
        standby.on_lost = lambda serial: self._company.hand.mind(ready=-serial)

    async def start(self) -> None:
        """Lead."""
        await self._company.start()
        self._looking = background.start(self._look_for_nodes())

    async def finish(self, code: int, reason: str, *, saved: bool) -> None:
        """Have all nodes leave with that exit code."""
        await self._lead.finish(code, reason, saved=saved)

    async def close(self) -> None:
        """Lead no more."""
        if self._looking is not None:
            self._looking.cancel()
        await self._company.close()

    def check(self) -> None:
        """Raise LeadershipLostError if another node leads, or may lead, the job now."""
        self._lead.check()

    # ------------------------------------------------------------------ an attempt

    @property
    def bad_nodes(self) -> Collection[str]:
        """Those that are left out at present."""
        return self._roster.bad

    def saves(self, attempt: Attempt) -> LeaderSaves:
        """The leader."""
        return self._company.saves

    def follow(self, pulse: Pulse) -> Callable[[int, ProposalFlag], None]:
        """What all have saved comes from the leader; of this node's part its report tells."""
        self._pulse = pulse
        return lambda _step, _flags: None

    async def muster(self, number: int) -> Turn | None:
        """The nodes of the next attempt; None when there is to be none, because of a stop that ``Stopping`` knows.

        Raises LeadershipLostError, also when it is this node that must leave, and another one is to lead.
        """
        assignment: Assignment | None = None
        while assignment is None:
            await self._let_go()
            found = asyncio.ensure_future(self._roster.muster(number))
            stop = asyncio.ensure_future(self._stopping.seen.wait())
            leave = asyncio.ensure_future(self._change.own_leave.wait())
            try:
                await asyncio.wait({found, stop, leave}, return_when=asyncio.FIRST_COMPLETED)
                if found.done():
                    if (assignment := found.result()) is None:
                        self._stopping.ask(StopCause.PREEMPTION, "too few nodes")
                        return None
                elif stop.done():
                    return None
            finally:
                for task in (found, stop, leave):
                    task.cancel()
                await asyncio.gather(found, stop, leave, return_exceptions=True)
        report = self._company.joining.report
        return Turn(
            nodes=len(assignment.members),
            rank=assignment.rank_of(report.name, report.life) or 0,
            from_standby=assignment.standby > 0,
            assignment=assignment,
        )

    def begin(self, attempt: Attempt, turn: Turn, *, from_standby: bool) -> Rendezvous:
        """All nodes launch it."""
        assignment = turn.assignment
        assert assignment is not None
        if (
            turn.from_standby and not from_standby
        ):  # the standby here has gone after all: a cold start, elsewhere
            assignment = self._roster.cold(assignment)
        self._assignment, self._attempt, self._apart = assignment, attempt, ()
        self._change.begin(attempt)
        meeting = self._company.begin(attempt, assignment)
        background.start(self._look_at_start(attempt))
        return meeting

    async def choose(self, number: int, turn: Turn) -> Resume:
        """Where it resumes, on all nodes alike. Raises CheckpointError, StorageError."""
        assert self._assignment is not None
        await self._company.find_state(self._assignment, self._stores.draining.newest_committed)
        resume = await self._stores.choose(len(self._assignment.members))
        self._resumed_from = resume.kept
        self._company.tell_origin(number, resume)
        return resume

    def made_first_step(self, attempt: Attempt) -> None:
        """All ranks have: each node is to launch its part of the standby."""
        self._lead.standby.arm()

    async def end(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        """Once it has ended on all nodes."""
        failure, noticed, completed = outcome
        self._attempt = None
        self._change.ended()
        wait = attempt.finished and failure is None and not self._stopping.cut_short
        cause, departed = await self._company.end(attempt, failure, wait=wait, noticed=noticed)
        stopping = self._stopping.requested is not None or self._change.why is not None
        failure = cause.failure if stopping else await self._apart_or(cause.failure, attempt.number)
        if failure is None and not stopping:
            failure = unfinished(departed, attempt=attempt.number, now=clock.now())
        if failure is not None and not stopping:
            progressed = self._ledger.record.failures_since_progress == 0
            self._roster.blame(cause.node if failure.kind in _SUSPICIOUS else None, progressed=progressed)
        if self._resumed_from is not None and any(one.ended and one.ended.unloadable for one in departed):
            self._stores.doubt(attempt.number, [self._resumed_from])
        completed = completed and all(one.ended is not None and one.ended.completed for one in departed)
        return Outcome(failure, cause.noticed or noticed, completed)

    # ------------------------------------------------------------------ nodes that do not reach each other

    async def _look_at_start(self, attempt: Attempt) -> None:
        """End an attempt that cannot get to its first step: its ranks wait for each other longer than anybody should."""
        patience = START
        with contextlib.suppress(LeadershipLostError):  # which is told where it matters
            while not await _ends_within(attempt, patience):
                patience = min(2 * patience, LONGEST_START)
                if self._ledger.record.attempt_first_time is not None or attempt.in_session:
                    return
                pairs = await self._lead.probing.pairs()
                if pairs and self._attempt is attempt and not attempt.ended.is_set():
                    self._apart = pairs
                    attempt.call_off()

    async def _apart_or(self, failure: Failure | None, attempt: int) -> Failure | None:
        """The failure of an attempt, or that of the network behind it."""
        if failure is not None and failure.kind in _MAY_BE_APART:
            self._apart = await self._lead.probing.pairs()
        elif failure is not None:
            return failure
        if not self._apart:
            return failure
        why = f"{reach.described(self._apart)}, though they reach the store"
        names = reach.left_out(self._apart, self._roster.names, self._company.joining.report.name)
        goes_on = self._roster.leave_out(names, why)
        return Failure(
            kind=FailureKind.NODE_LOST if goes_on else FailureKind.COMMUNICATION,
            reason=why if failure is None else f"{why} ({failure.reason})",
            attempt=attempt,
            step=None if failure is None else failure.step,
            time=clock.now(),
        )

    # ------------------------------------------------------------------ stops, and other nodes

    def stop(self) -> None:
        """The job is to stop."""
        self._lead.standby.drop()
        self._lead.stop(self._stopping.requested)

    def go_on(self) -> None:
        """It is not, after all."""
        self._change.why = None
        self._lead.stop(None)

    @property
    def reshaping(self) -> str | None:
        """Why the attempt was stopped only to go on with other nodes."""
        return self._change.why if self._stopping.requested is None else None

    async def _let_go(self) -> None:
        """Have those leave that must, once what they take along is durable. Raises LeadershipLostError: it is this node."""
        unsaved = None
        change, taken_apart = self._change, self._change.why is not None and not self._copies
        if change.takes_along or taken_apart:  # nobody can have what is in another's memory
            unsaved = await self._stores.draining.secure(None, may_drain=True)
        if self._stopping.requested is not None or not change.let_go(saved=not unsaved):
            return
        reason = f"{change.reason}: another node leads from here on, the job goes on without this one"
        if unsaved:
            reason = f"{reason}; {unsaved}"
        self._ledger.add(RunEnded(time=clock.now(), exit_code=EXIT_AGAIN, reason=reason))
        self._company.hand.mind(leaving=True)  # the next leader is not to count on this node
        await self._lead.resign()
        raise LeadGivenUpError(reason, saved=not unsaved)

    async def _look_for_nodes(self) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            since = self._ledger.record.attempt_first_time
            if self._attempt is None or since is None or self._change.why or self._stopping.requested:
                continue
            if self._attempt.in_session and self._roster.should_grow(clock.now() - since):
                self._change.stop_for(f"with {', '.join(self._roster.newcomers())}")

    def _heed(self, news: Mapping[str, Report | None]) -> None:
        """What other nodes have said, among it what they have heard."""
        own, stopping = self._company.joining.report.name, self._stopping
        for name, report in news.items():
            if report is None:
                self._heard.pop(name, None)
                stopping.left(name)
            elif name != own and (report.notice is not None or report.standing or name in self._heard):
                self._heard[name] = report
        for name, report in list(self._heard.items()):
            stopping.on_nodes_notices(name, report.standing)
            if report.notice is not None and stopping.requested is None:
                source = f"{report.notice.source} on {name}"
                if report.notice.cause is not StopCause.PREEMPTION:
                    stopping.ask(report.notice.cause, source, report.notice.deadline)
                elif not self._change.is_due(name, source):
                    stopping.depart(name, source, report.notice.deadline)
        self._change.look()

    def _on_saved(self, step: int, flags: ProposalFlag) -> None:
        if self._pulse is not None and self._attempt is not None:
            self._pulse.saved(step, flags)

    # ------------------------------------------------------------------ the standby

    def _on_standby(self, ordered: Assignment | None) -> None:
        attempt = self._attempt
        if ordered is None:
            if self._standby.attempt is not None and self._standby.attempt.standby == self._standby_serial:
                background.start(self._standby.drop())
            return
        if (
            ordered.standby <= self._standby_serial
            or attempt is None
            or attempt.number + 1 != ordered.attempt
        ):
            return
        self._standby_serial = ordered.standby
        try:
            self._standby.arm_for(attempt, ordered.standby, self._company.hand.meeting(ordered))
        except UsageError:
            self._company.hand.mind(ready=-ordered.standby)


async def _ends_within(attempt: Attempt, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(attempt.ended.wait(), seconds)
    return attempt.ended.is_set()


def companions(
    team: Team | None, stores: Stores, standby: Standby, stopping: Stopping, ledger: Ledger, options: Options
) -> Companions:
    """Of a node that decides: those that it leads, or nobody."""
    if team is None:
        return Nobody(stores, standby, ledger)
    return WithOthers(stores, standby, stopping, ledger, copies=options.peer_copies == "on")
