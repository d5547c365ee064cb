"""Leases seen from the side that holds them; what a node does that is cut off."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide.fencing import DRIFT, Isolation, Tenure, isolated
from supervisor.edge.store.table import Table

SECONDS = st.floats(0.01, 50)


@given(
    seconds=st.floats(1, 60),
    renewals=st.lists(st.tuples(SECONDS, SECONDS, st.booleans()), max_size=20),
    wait=st.floats(0, 100),
    skew=st.floats(-1e6, 1e6),
    speed=st.floats(1 - DRIFT / 2, 1 + DRIFT / 2),
)
def test_a_holder_never_counts_on_a_lease_that_the_store_has_let_run_out(
    seconds: float, renewals: list[tuple[float, float, bool]], wait: float, skew: float, speed: float
) -> None:
    """However long requests and answers take, whichever are lost, and though the clocks are not the same."""
    table = Table(0)

    def theirs(now: float) -> float:
        return now * speed + skew

    now = 0.0
    lease = table.grant(seconds, theirs(0.0))
    tenure = Tenure(seconds=seconds, since=now)
    table._looked = None
    for going, coming, heard in renewals:
        began = now
        now += going
        look(table, theirs(now))
        renewed = table.renew(lease, theirs(now))
        now += coming
        if heard and renewed:
            tenure = Tenure(seconds=seconds, since=began)
    now += wait
    look(table, theirs(now))
    if tenure.holds(now):
        assert table.renew(lease, theirs(now))


def look(table: Table, now: float) -> None:
    table._looked = None  # its process was never stopped
    table.expire(now)


@pytest.mark.parametrize(
    ("silent", "moved", "needs", "expected"),
    [
        (1.0, 0.1, False, Isolation.GO_ON),
        (1.0, None, True, Isolation.GO_ON),
        (600.0, 0.1, False, Isolation.GO_ON),  # nobody has taken their place: a collective needs all of them
        (10.0, 9.0, False, Isolation.GO_ON),
        (70.0, 61.0, False, Isolation.END),
        (20.0, None, False, Isolation.GO_ON),
        (61.0, None, False, Isolation.LEAVE),
        (20.0, 0.1, True, Isolation.GO_ON),
        (61.0, 0.1, True, Isolation.LEAVE),
    ],
)
def test_a_node_that_is_cut_off(silent: float, moved: float | None, needs: bool, expected: Isolation) -> None:
    found = isolated(silent=silent, lease=5.0, patience=60.0, moved=moved, needs_decision=needs)
    assert found is expected
