"""The leader's half of a standby on several nodes (``standby``): all have their part of it ready, or it is not used."""

from __future__ import annotations

from collections.abc import Collection

from supervisor.edge import clock
from supervisor.fleet import Assignment, Member
from supervisor.orders import Orders
from supervisor.roster import Roster
from supervisor.standby import DELAY, LATER, TRIES


class OrderedStandby:
    """Of one leader. ``begin`` with each attempt, ``arm`` it after its first step, ``think`` with all news of it."""

    def __init__(self, orders: Orders, roster: Roster, *, enabled: bool) -> None:
        self._orders, self._roster, self._enabled = orders, roster, enabled
        self._attempt = -1
        self._due: float | None = None
        self._tries = 0
        self._standing: set[Member] = set()  # whose part is ready, or was

    def begin(self, attempt: int) -> None:
        """Another attempt."""
        self._attempt, self._due, self._tries = attempt, None, 0

    def arm(self) -> None:
        """The attempt has made its first step: have the next one made ready on its nodes."""
        if self._enabled:
            self._due, self._tries = clock.monotonic() + DELAY, TRIES

    def drop(self) -> None:
        """It is not wanted any more."""
        self._due = None
        if self._orders.order.standby is not None:
            self._orders.change(standby=None)

    def think(self, news: Collection[Member]) -> None:
        """Order one when it is time to, and no more where a node does not have it, or has gone. ``news``: who has told something."""
        standby, members = self._orders.order.standby, self._roster.members
        if standby is not None:
            told = {member: self._orders.report(member) for member in news}
            self._standing |= {
                one for one, report in told.items() if report and report.ready == standby.standby
            }
            if any(report is None or report.ready == -standby.standby for report in told.values()):
                self._orders.change(standby=None)
                pause = DELAY
                if self._tries == 0 and self._standing.issuperset(standby.members):
                    self._tries, pause = 1, LATER
                again = self._tries > 0 and None not in told.values()
                self._due = clock.monotonic() + pause if again else None
        elif self._due is not None and clock.monotonic() >= self._due:
            reports = [self._orders.report(member) for member in members]
            if (host := reports[0]) is None or None in reports:
                return
            self._due = None
            self._tries -= 1
            self._standing.clear()
            self._orders.change(
                standby=Assignment(
                    attempt=self._attempt + 1,
                    members=members,
                    address=host.address,
                    port=host.port,
                    peers=self._roster.peers(members),
                    standby=self._orders.next_serial(),
                )
            )
