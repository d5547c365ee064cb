"""When to stop for a deadline, and how long a stop may take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide.deadline import LEAST, MARGIN, Costs, Deadline, lead, patience, stop_at

DAY = 86400.0


def deadline(end: float, kill_wait: float = 30.0) -> Deadline:
    return Deadline(source="a test", end=end, kill=end + kill_wait)


@pytest.mark.parametrize(
    ("costs", "known_at", "expected"),
    [
        (Costs(), 0.0, DAY - 60),  # nothing measured: the grace
        (Costs(), DAY - 40, DAY - 20),  # … but half of the time at most
        (Costs(step=5.0), DAY + 10, DAY),  # heard of too late
        (Costs(save=20.0), 0.0, DAY - LEAST - 40),
        (Costs(save=20.0, step=5.0), 0.0, DAY - LEAST - 50),
        (Costs(save=300.0), 0.0, DAY - LEAST - 600),  # longer than the grace: measured is measured
        (Costs(save=0.1), DAY - 20, DAY - LEAST - 0.2),
        (Costs(save=200.0), DAY - 300, DAY - 225),  # it must train for a part of its time
    ],
)
def test_when_to_stop(costs: Costs, known_at: float, expected: float) -> None:
    assert stop_at(deadline(DAY), known_at, costs, 60.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("limit", "costs", "expected"),
    [
        (None, Costs(), 60.0),  # nobody says: the grace
        (deadline(DAY), Costs(), 60.0),  # far away: the grace
        (deadline(0.0, 20.0), Costs(), 20.0 - MARGIN),  # killed in 20 s
        (deadline(10.0, 20.0), Costs(save=300.0), 30.0 - MARGIN),  # all there is
        (deadline(DAY), Costs(save=300.0), LEAST + 600),  # saving takes longer than the grace
        (deadline(-DAY), Costs(), 1.0),
    ],
)
def test_how_long_a_stop_may_take(limit: Deadline | None, costs: Costs, expected: float) -> None:
    assert patience(limit, 0.0, costs, 60.0) == pytest.approx(expected)


TIMES = st.floats(0, 1e6)


@given(save=st.none() | TIMES, step=st.none() | TIMES, grace=st.floats(0.1, 1e5), end=st.floats(1e6, 2e6))
def test_the_stop_begins_before_the_end_and_is_over_before_the_kill(
    save: float | None, step: float | None, grace: float, end: float
) -> None:
    costs, one = Costs(save=save, step=step), deadline(end)
    begins = stop_at(one, 0.0, costs, grace)
    assert begins <= end
    assert end - begins <= lead(costs, grace) + 1e-6
    assert begins + patience(one, begins, costs, grace) <= max(one.kill - MARGIN, begins + 1.0) + 1e-6
