"""Young's and Daly's intervals, against their papers and against the cost they minimise."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide.interval import daly, estimate_mtbf, young, young_daly

costs = st.floats(1e-3, 1e4)
mtbfs = st.floats(1, 1e8)


def wall_time(interval: float, cost: float, mtbf: float) -> float:
    """Expected wall time per second of work with Poisson failures (Daly 2006, equation 20, restarts for free)."""
    return mtbf / interval * math.expm1((interval + cost) / mtbf)


def test_young_is_the_square_root() -> None:
    assert young(60, 86400) == pytest.approx(math.sqrt(2 * 60 * 86400))
    assert young(5, 1000) == pytest.approx(100)


def test_daly_in_numbers() -> None:
    # sqrt(2 * 300 * 14400) = 2939.39; ratio 300 / 28800
    ratio = 300 / 28800
    assert daly(300, 14400) == pytest.approx(
        2939.3877 * (1 + math.sqrt(ratio) / 3 + ratio / 9) - 300, rel=1e-6
    )
    assert daly(100, 40) == 40  # saving takes longer than 2 MTBF: nothing better than the MTBF itself


@given(mtbf=mtbfs)
def test_daly_is_continuous_enough_at_its_limit(mtbf: float) -> None:
    assert daly(2 * mtbf * (1 - 1e-9), mtbf) == pytest.approx(mtbf * 8 / 9, rel=1e-3)
    assert daly(2 * mtbf, mtbf) == mtbf


@given(cost=costs, ratio=st.floats(1e-6, 0.1))
def test_daly_agrees_with_young_where_saving_is_cheap(cost: float, ratio: float) -> None:
    mtbf = cost / ratio
    assert daly(cost, mtbf) == pytest.approx(young(cost, mtbf), rel=math.sqrt(ratio))


@given(cost=costs, ratio=st.floats(1e-4, 0.5), other=st.floats(0.2, 5))
def test_no_other_interval_loses_less_time(cost: float, ratio: float, other: float) -> None:
    mtbf = cost / ratio
    best = daly(cost, mtbf)
    assert wall_time(best, cost, mtbf) <= wall_time(best * other, cost, mtbf) * 1.002


@given(cost=costs, mtbf=mtbfs, more=st.floats(1, 100))
def test_rarer_failures_lengthen_it(cost: float, mtbf: float, more: float) -> None:
    if cost < mtbf:
        assert young_daly(cost, mtbf * more) >= young_daly(cost, mtbf) * (1 - 1e-9)


@given(cost=st.floats(0, 1e6), mtbf=st.floats(1e-6, 1e12) | st.just(math.inf))
def test_it_stays_within_its_bounds(cost: float, mtbf: float) -> None:
    assert 2 <= young_daly(cost, mtbf, shortest=2, longest=3600) <= 3600


def test_the_edges() -> None:
    assert young_daly(0, 1000, shortest=3) == 3
    assert young_daly(10, math.inf, longest=500) == 500


@pytest.mark.parametrize("cost", [-1, math.nan, math.inf])
def test_a_cost_that_is_none_is_refused(cost: float) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        young_daly(cost, 1000)


@pytest.mark.parametrize("mtbf", [0, -1, math.nan])
def test_a_mean_that_is_none_is_refused(mtbf: float) -> None:
    with pytest.raises(ValueError, match="is not positive"):
        young_daly(1, mtbf)


@pytest.mark.parametrize("bounds", [(0, 1), (5, 4), (math.nan, 1)])
def test_bounds_that_cross_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="bounds"):
        young_daly(1, 1000, shortest=bounds[0], longest=bounds[1])


def test_the_estimate_starts_at_the_prior_and_ends_at_the_measurement() -> None:
    assert estimate_mtbf(failures=0, seconds=0, prior=86400) == 86400
    assert estimate_mtbf(failures=0, seconds=86400, prior=86400) == 2 * 86400
    assert estimate_mtbf(failures=1000, seconds=1e6, prior=86400) == pytest.approx(1000, rel=0.1)
    for wrong in ({"failures": -1}, {"seconds": -1.0}, {"prior": 0.0}, {"seconds": math.nan}):
        with pytest.raises(ValueError, match="failures in"):
            estimate_mtbf(**{"failures": 1, "seconds": 1.0, "prior": 1.0, **wrong})  # type: ignore[arg-type]
