"""Who takes part in the next attempt of a job on several nodes (the rules are ``decide/membership``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from supervisor.config import Options
from supervisor.decide import membership
from supervisor.decide.membership import Present, Size, Suspicions
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.fleet import Assignment, Member, Report
from supervisor.orders import Orders

REGATHERING: Final = 1.0  # seconds that a new leader of a job that was running waits for more than the least
SAID_AFTER: Final = 3.0  # seconds of waiting for nodes until that is said


class Roster:
    """Of one leader. ``assignment`` is the newest attempt's."""

    def __init__(
        self, orders: Orders, options: Options, console: Console, size: Size, before: Assignment | None
    ) -> None:
        self._orders, self._options, self._console, self._size = orders, options, console, size
        self._previous: Sequence[str] = before.names if before is not None else ()
        self._suspicions = Suspicions()
        self._since: dict[Member, float] = {}  # when a node was first seen
        self.assignment: Assignment | None = None
        #: nodes that must leave
        self.leaving: frozenset[str] = frozenset()

    @property
    def members(self) -> tuple[Member, ...]:
        """The nodes of the newest attempt, by rank."""
        return self.assignment.members if self.assignment is not None else ()

    @property
    def reports(self) -> dict[str, Report]:
        """Of all nodes that there are, by name."""
        return self._orders.reports

    @property
    def others(self) -> list[Member]:
        """… less this one."""
        return [member for member in self.members if member.name != self._orders.own]

    @property
    def names(self) -> tuple[str, ...]:
        """… of all of them, by rank."""
        return self.assignment.names if self.assignment is not None else ()

    async def muster(self, number: int) -> Assignment | None:
        """The nodes of attempt ``number``, as soon as there are enough; None when there were too few for --node-timeout."""
        began, said = clock.monotonic(), False
        first = self.assignment is None
        gathering = membership.GATHERING if not self._previous else REGATHERING

        def found() -> tuple[Member, ...] | None:
            nonlocal said
            now, waited = clock.monotonic(), clock.monotonic() - began
            present, excluded = self._present(), self._excluded()
            members = None
            if not first or membership.may_start(present, self._size, excluded, now, gathering):
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

        if not await self._orders.until(enough, self._options.node_timeout):
            return None
        assert chosen is not None
        host = self._orders.reports[chosen[0].name]
        assignment = Assignment(
            attempt=number, members=chosen, address=host.address, port=host.port, peers=self.peers(chosen)
        )
        standby = self._orders.order.standby
        if (
            standby is not None
            and standby.attempt == number
            and standby.members == chosen
            and self.all_ready(standby)
        ):
            assignment = standby
        self.assignment, self._previous = assignment, assignment.names
        return assignment

    def peers(self, members: Sequence[Member]) -> tuple[str, ...]:
        """Where each shows its snapshots."""
        reports = [self._orders.reports[member.name] for member in members]
        return tuple(f"{report.address}:{report.shown}" for report in reports)

    def _present(self, *, busy_too: bool = False) -> list[Present]:
        found = []
        now = clock.monotonic()
        for report in self._orders.reports.values():
            member = Member(name=report.name, life=report.life)
            since = self._since.setdefault(member, now)
            busy = (
                report.course is not None
                and report.course.ended is None
                and report.course.attempt <= self._orders.order.over
            )
            heard = report.seen >= self._orders.first and report.shown
            leaves = report.leaving or report.notice is not None or report.name in self.leaving
            if heard and not leaves and (busy_too or not busy):
                found.append(Present(member=member, rank=report.rank, since=since))
        return found

    @property
    def bad(self) -> frozenset[str]:
        """The names of nodes that are better left out."""
        return self._suspicions.excluded_at(clock.now())

    def _excluded(self) -> frozenset[str]:
        return self.bad - {self._orders.own}

    def _with_own(self, members: tuple[Member, ...] | None) -> tuple[Member, ...] | None:
        """The leader takes part itself; with more spare nodes than places, in the place of the last."""
        own = self._orders.own_member
        if members is None or own in members:
            return members
        if own not in [one.member for one in self._present()]:
            return None  # its report is on its way: it keeps its place
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

    @property
    def apart(self) -> frozenset[str]:
        """The names of nodes that others do not reach."""
        return self._suspicions.apart_at(clock.now())

    def leave_out(self, names: Collection[str], reason: str) -> bool:
        """Go on without these, which others do not reach, if there are enough others; whether there are."""
        there = {one.member.name for one in self._present()}
        if len(there - self._excluded() - set(names)) < self._size.least:
            return False
        for name in names:
            self._suspicions = membership.exclude(self._suspicions, name, reason, clock.now(), apart=True)
            seconds = self._suspicions.excluded[name].seconds
            self._console.say(f"node {name} is left out for {seconds / 60:.0f} minutes: {reason}")
        return True

    def should_grow(self, running: float) -> bool:
        """Whether there are nodes that an attempt, which has made steps for ``running`` seconds, should be stopped for."""
        if self.assignment is None or self._size.least == self._size.most:
            return False
        return membership.should_grow(
            self._present(),
            self.assignment.members,
            self._size,
            excluded=self._excluded(),
            running=running,
            now=clock.monotonic(),
        )

    def newcomers(self) -> list[str]:
        """Nodes that wait to take part."""
        members = self.assignment.names if self.assignment else ()
        return sorted(one.member.name for one in self._present() if one.member.name not in members)

    @property
    def own(self) -> Member:
        """This node."""
        return self._orders.own_member

    def member(self, name: str) -> Member | None:
        """The node of that name, as it lives now."""
        if name == self._orders.own:
            return self._orders.own_member
        report = self._orders.reports.get(name)
        return Member(name=name, life=report.life) if report is not None else None

    def goes_on_without(self, names: Collection[str], *, others_lead: bool) -> bool:
        """Whether the job does, when those must leave. ``others_lead``: another node could lead it."""
        here = [one.member.name for one in self._present(busy_too=True)]
        return membership.goes_on_without(
            names, here=here, size=self._size, leader=self._orders.own, others_lead=others_lead
        )

    def cold(self, assignment: Assignment) -> Assignment:
        """Not with the standby, where nodes may be waiting already: at another port of the same host."""
        host = self._orders.report(assignment.members[0])
        port = host.port if host is not None else assignment.port
        self.assignment = replace(assignment, port=port, standby=0)
        return self.assignment

    def all_ready(self, standby: Assignment) -> bool:
        """Whether all of its nodes have it at the gate."""
        reports = [self._orders.report(member) for member in standby.members]
        return all(report is not None and report.ready == standby.standby for report in reports)
