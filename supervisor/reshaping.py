"""Going on with other nodes: the attempt is stopped, at a step that all have saved, for nodes that have come or that must leave.

A node that must leave is no reason to stop the job where enough others stay (``decide/membership``). Why it must may be withdrawn; what
was not begun is called off then. It leaves when the leader lets it go, which is once what was saved is durable. The leader itself may be the
one that must: it gives up the lead, and leaves. A save that does not come about in the time that is left is not waited for.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Collection
from dataclasses import dataclass, replace

from supervisor.attempt import Attempt
from supervisor.decide.notices import Plan
from supervisor.edge import clock, processes
from supervisor.edge.console import Console
from supervisor.fleet import Member
from supervisor.lead import Lead
from supervisor.model import ProposalFlag
from supervisor.stopping import Stopping


@dataclass(frozen=True, kw_only=True)
class Leaver:
    """A node that must leave. ``sources``: who wants that; ``limit``: until when a save is waited for, ``half``: … a Session (monotonic seconds)."""

    member: Member
    sources: frozenset[str]
    half: float
    limit: float
    plan: Plan


class Reshaping:
    """Of one leader; ``Fellows`` to its ``Stopping``. ``begin`` with each attempt, ``look`` by the clock."""

    def __init__(self, lead: Lead, stopping: Stopping, console: Console, *, others_lead: bool) -> None:
        self._lead, self._stopping, self._console = lead, stopping, console
        self._roster, self._others_lead = lead.roster, others_lead
        self._attempt: Attempt | None = None
        self._leavers: dict[str, Leaver] = {}
        self._freed: set[Member] = set()
        #: why the attempt is stopped, to go on with other nodes
        self.why: str | None = None
        #: set once this node must leave
        self.own_leave = asyncio.Event()
        stopping.fellows = self

    # ------------------------------------------------------------------ an attempt

    def begin(self, attempt: Attempt) -> None:
        """Another attempt, with those nodes that stay."""
        self._attempt, self.why = attempt, None

    def ended(self) -> None:
        """It has, on all nodes."""
        self._attempt = None

    def look(self) -> None:
        """Do about those that must leave what can be done now."""
        attempt = self._attempt
        self._forget_gone()
        if not self._leavers or self._stopping.requested is not None:
            return
        self._free([one.member for one in self._leavers.values() if one.member not in self._roster.members])
        leavers = [one for one in self._leavers.values() if one.member in self._roster.members]
        if attempt is None or attempt.ended.is_set() or not leavers:
            return
        first = min(leavers, key=lambda one: one.limit)
        if first.plan is not Plan.SAVE or not attempt.seats or clock.monotonic() >= first.limit:
            self.why = self.why or self._without(leavers)
            attempt.call_off()
        elif self.why is None and attempt.in_session:
            self.stop_for(self._without(leavers))
        elif self.why is None and not attempt.has_session and clock.monotonic() >= first.half:
            self._ask_script(attempt, self._without(leavers))

    def stop_for(self, why: str) -> None:
        """Have all ranks save the same step and leave, to go on ``why``."""
        assert self._attempt is not None
        self.why = why
        self._console.say(f"all ranks save the same step, to go on {why}")
        self._attempt.stopping = True
        self._lead.standby.drop()
        self._lead.stop_for(why)
        self._lead.want(ProposalFlag.STOP | ProposalFlag.CHECKPOINT)

    def _ask_script(self, attempt: Attempt, why: str) -> None:
        """It has not opened a Session, and may have a handler of its own: as when the job stops."""
        self.why = why
        attempt.stopping = True
        self._lead.stop_for(why)
        processes.send([seat.pid for seat in attempt.seats.values() if seat.end is None], signal.SIGTERM)

    # ------------------------------------------------------------------ who leaves

    @property
    def takes_along(self) -> bool:
        """Whether somebody is about to leave, with what is in its memory."""
        return any(one.member not in self._freed for one in self._leavers.values())

    @property
    def reason(self) -> str:
        """Why somebody must leave."""
        return ", ".join(sorted({source for one in self._leavers.values() for source in one.sources}))

    @property
    def leaving(self) -> Collection[str]:
        """Those that the job is about to go on without."""
        return self._leavers.keys()

    def go_on_without(self, node: str, source: str, deadline: float | None) -> bool:
        """``source`` wants that node away: whether the job goes on without it."""
        member = self._roster.member(node)
        if member is None or not self._roster.goes_on_without(
            {*self._leavers, node}, others_lead=self._others_lead
        ):
            return False
        before = self._leavers.get(node)
        patience, plan = self._stopping.afford(deadline)
        now, sources = clock.monotonic(), frozenset({source})
        leaver = Leaver(
            member=member, sources=sources, half=now + patience / 2, limit=now + patience, plan=plan
        )
        if before is not None:
            nearer = min(before, leaver, key=lambda one: one.limit)
            leaver = replace(nearer, sources=before.sources | sources)
        elif plan is not Plan.SAVE:
            self._console.say(f"{source}: {patience:.3g} s are too short for a new snapshot; {plan.value}")
        self._leavers[node] = leaver
        self._tell()
        self.look()
        return True

    def is_due(self, node: str, source: str) -> bool:
        """Whether the job is about to go on without that node, also for that source."""
        leaver = self._leavers.get(node)
        return leaver is not None and source in leaver.sources

    def keep(self, node: str, source: str) -> bool | None:
        """``source`` does not, after all: whether the node stays; None: it never had to leave for that, or others want it, too."""
        if not self.is_due(node, source):
            return None
        leaver = self._leavers[node]
        if leaver.member in self._freed:
            return False
        if len(leaver.sources) > 1:
            self._leavers[node] = replace(leaver, sources=leaver.sources - {source})
            return None
        del self._leavers[node]
        self._tell()
        attempt = self._attempt
        if self.why is None or attempt is None or self._leavers or self._stopping.requested is not None:
            return True  # nothing was begun, or others want it, too: this node is part of what comes then
        if attempt.ended.is_set() or not self._lead.rounds.recall_stop():
            return False
        self.why = None
        attempt.stopping = False
        self._lead.stop(None)
        self._lead.standby.arm()
        return True

    def let_go(self, *, saved: bool) -> bool:
        """What was saved is durable, or cannot be: those that must leave may; whether this node is one of them."""
        self._forget_gone()
        own = self._roster.own
        self._free([one.member for one in self._leavers.values() if one.member != own], saved=saved)
        return own.name in self._leavers

    def _free(self, members: Collection[Member], *, saved: bool = True) -> None:
        new = [one for one in members if one not in self._freed and one != self._roster.own]
        if new:
            self._freed |= set(new)
            self._lead.release(new, saved=saved)

    def _forget_gone(self) -> None:
        gone = [name for name, one in self._leavers.items() if self._roster.member(name) != one.member]
        for name in gone:
            del self._leavers[name]
        if gone:
            self._tell()

    def _tell(self) -> None:
        self._roster.leaving = frozenset(self._leavers)
        if self._roster.own.name in self._leavers:
            self.own_leave.set()
        else:
            self.own_leave.clear()

    @staticmethod
    def _without(leavers: Collection[Leaver]) -> str:
        return "without " + ", ".join(
            f"{one.member.name} ({', '.join(sorted(one.sources))})" for one in leavers
        )
