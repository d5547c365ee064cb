"""When a leader has a standby made ready on its nodes, and when no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.edge import clock
from supervisor.fleet import Assignment, Member
from supervisor.ordered_standby import OrderedStandby
from supervisor.standby import DELAY, LATER, TRIES

MEMBERS = tuple(Member(name=name, life=name) for name in "ab")


class Nodes:
    """Of two nodes: what is ordered, and what they report."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(clock, "monotonic", lambda: self.now)
        self.order = SimpleNamespace(standby=None)
        self.reports = {one: SimpleNamespace(address="h", port=1, ready=0) for one in MEMBERS}
        self._serial = 0
        roster: Any = SimpleNamespace(members=MEMBERS, peers=lambda _members: ())
        orders: Any = SimpleNamespace(
            order=self.order, report=self.reports.get, change=self._change, next_serial=self._next
        )
        self.standby = OrderedStandby(orders, roster, enabled=True)

    def _change(self, *, standby: Assignment | None) -> None:
        self.order.standby = standby

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    def pause(self, limit: float) -> float | None:
        """How long until there is an order."""
        since = self.now
        while self.now <= since + limit:
            self.standby.think(())
            if self.order.standby is not None:
                return self.now - since
            self.now += 1.0
        return None

    def say(self, number: int, *, ready: bool) -> None:
        self.reports[MEMBERS[number]].ready = self._serial if ready else -self._serial
        self.standby.think([MEMBERS[number]])


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    one = Nodes(monkeypatch)
    one.standby.begin(0)
    one.standby.arm()
    return one


def test_one_that_was_ready_is_followed_by_others_without_end(nodes: Nodes) -> None:
    pauses = []
    for _ in range(TRIES + 2):
        pauses.append(nodes.pause(1000))
        nodes.say(0, ready=True)
        nodes.say(1, ready=True)
        nodes.say(0, ready=False)
        assert nodes.order.standby is None
    assert pauses == [DELAY] * TRIES + [LATER] * 2


def test_one_that_never_is_ready_everywhere_is_given_up(nodes: Nodes) -> None:
    for _ in range(TRIES):
        assert nodes.pause(1000) == DELAY
        nodes.say(1, ready=True)
        nodes.say(0, ready=False)
    assert nodes.pause(1000) is None


def test_a_node_that_has_gone_ends_it(nodes: Nodes) -> None:
    assert nodes.pause(1000) == DELAY
    del nodes.reports[MEMBERS[0]]
    nodes.standby.think([MEMBERS[0]])
    assert nodes.order.standby is None
    assert nodes.pause(1000) is None


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Nodes(monkeypatch)
    one.standby._enabled = False
    one.standby.arm()
    assert one.pause(1000) is None
