"""A simulated run: what it must keep whatever strikes, and what it must come to where that can be worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import lifecycle
from supervisor.decide.measured import measure
from supervisor.decide.simulation import Blow, Costs, Plan, Strike, simulate
from supervisor.model import (
    Action,
    AttemptStarted,
    CheckpointCommitted,
    Decided,
    Fact,
    FirstStep,
    Limits,
    Resumed,
    RunStarted,
    StandbyReady,
    State,
)

DAY = 86400.0
COSTS = Costs(step=5.0, drain=20.0)
PLENTY = Limits(max_failures=10**6, max_preemptions=10**6)


def poisson(mtbf: float, *blows: Blow, seed: int = 0) -> Iterator[Strike]:
    chance, now = random.Random(seed), 0.0
    while True:
        now += chance.expovariate(1 / mtbf)
        yield Strike(now, chance.choice(blows))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Plan, Costs, list[Strike]]:
    seconds = st.floats(0.0, 500.0)
    some = st.none() | st.floats(1.0, 900.0)
    every = draw(st.sampled_from(["auto"]) | some)
    plan = Plan(
        seconds=draw(st.floats(1.0, 20_000.0)),
        steps=draw(st.none() | st.integers(1, 3000)),
        snapshot_every=draw(some),
        checkpoint_every=every,
        peers=draw(st.booleans()),
        limits=Limits(max_failures=draw(st.integers(0, 9)), max_preemptions=draw(st.integers(0, 9))),
    )
    names = (
        "stall",
        "drain",
        "startup",
        "relaunch",
        "standby",
        "detection",
        "hang_detection",
        "teardown",
        "restore",
        "fetch",
        "replacement",
        "away",
    )
    costs = Costs(step=draw(st.floats(0.5, 50.0)), **{name: draw(seconds) for name in names})
    times = sorted(draw(st.lists(st.floats(0.0, 20_000.0), max_size=30)))
    return plan, costs, [Strike(time, draw(st.sampled_from(Blow))) for time in times]


@given(worlds())
def test_whatever_strikes_every_second_is_accounted_for_and_nothing_durable_is_lost(
    world: tuple[Plan, Costs, list[Strike]],
) -> None:
    plan, costs, strikes = world
    facts: list[Fact] = []
    outcome = simulate(plan, costs, strikes, facts.append)
    assert outcome.seconds >= 0
    assert outcome.record.spent.total == pytest.approx(outcome.seconds)
    assert 0 <= outcome.effective <= outcome.goodput + 1e-9 <= 1 + 1e-9
    assert [fact.time for fact in facts] == sorted(fact.time for fact in facts)
    assert lifecycle.fold(facts).step == outcome.record.step
    durable = 0
    for fact in facts:
        if isinstance(fact, CheckpointCommitted):
            assert fact.step >= durable
            durable = fact.step
        if isinstance(fact, Resumed):
            assert fact.step >= durable
    assert simulate(plan, costs, strikes) == outcome


def test_undisturbed_it_costs_the_start_and_the_stalls() -> None:
    outcome = simulate(
        Plan(steps=2000, snapshot_every=50.0, checkpoint_every=None),
        Costs(step=5.0, stall=0.5, startup=40.0),
        [],
    )
    assert outcome.record.state is State.COMPLETED
    assert outcome.record.step == 2000
    spent = outcome.record.spent
    assert spent.startup == pytest.approx(45.0)  # its last step included
    assert spent.productive == pytest.approx(1999 * 5.0, rel=0.001)
    assert spent.snapshot == pytest.approx(0.5 * (2000 * 5.0 / 49.5), rel=0.05)
    assert spent.redone == 0


@pytest.mark.parametrize(("peers", "blow", "lost"), [
    (False, Blow.NODE, 600.0 / 2 + 20.0),  # on average half an interval, and what the drain was about to save
    (True, Blow.NODE, 10.0 / 2),
    (False, Blow.PROCESS, 10.0 / 2),
])  # fmt: skip
def test_what_a_failure_loses_on_average(peers: bool, blow: Blow, lost: float) -> None:
    plan = Plan(seconds=80 * DAY, snapshot_every=10.0, checkpoint_every=600.0, peers=peers, limits=PLENTY)
    outcome = simulate(plan, COSTS, poisson(DAY / 10, blow))
    failures = outcome.record.restarts
    assert failures > 600
    # a step is 5 s: snapshots fall on whole steps, and the step under way is lost as well
    assert outcome.record.lost_steps * COSTS.step / failures == pytest.approx(lost, rel=0.1, abs=2.5)


def test_a_notice_loses_no_step() -> None:
    plan = Plan(seconds=100 * DAY, limits=PLENTY)
    outcome = simulate(plan, COSTS, poisson(DAY, Blow.PREEMPTION))
    assert outcome.record.preemptions > 60
    assert outcome.record.lost_steps == 0
    assert outcome.record.spent.stopped == pytest.approx(outcome.record.preemptions * COSTS.away, rel=0.05)


def test_a_job_that_cannot_get_anywhere_gives_up_as_the_real_one_does() -> None:
    facts: list[Fact] = []
    hopeless = [Strike(10.0 * number, Blow.PROCESS) for number in range(1, 100)]
    outcome = simulate(
        Plan(seconds=DAY, limits=Limits(max_failures=3)), Costs(step=50.0), hopeless, facts.append
    )
    assert outcome.record.state is State.FAILED
    assert "--max-failures allows 3" in (outcome.record.reason or "")
    verdicts = [fact for fact in facts if isinstance(fact, Decided)]
    assert [verdict.action for verdict in verdicts] == [Action.RESTART] * 3 + [Action.GIVE_UP]
    assert [verdict.delay for verdict in verdicts] == [0.0, 1.0, 2.0, 0.0]


def test_weeks_of_a_large_cluster_have_few_events() -> None:
    """Ten thousand times faster than real time on any machine: what counts is how many facts are folded."""
    facts: list[Fact] = []
    outcome = simulate(
        Plan(seconds=54 * DAY), COSTS, poisson(54 * DAY / 419, Blow.NODE, Blow.PROCESS), facts.append
    )
    assert outcome.record.restarts > 300
    assert len(facts) < 54 * DAY / 100


def test_a_journal_tells_its_costs_back() -> None:
    """Simulate, measure what the journal says, and simulate with that: the same world, so the same goodput."""
    costs = Costs(
        step=2.0, stall=0.5, drain=15.0, startup=50.0, relaunch=3.0, detection=0.0, hang_detection=90.0, teardown=1.0,
        restore=2.0, fetch=25.0, replacement=0.0, away=700.0,
    )  # fmt: skip
    plan = Plan(seconds=20 * DAY, snapshot_every=30.0, checkpoint_every=400.0, limits=PLENTY)
    facts: list[Fact] = []
    outcome = simulate(plan, costs, poisson(DAY / 12, *Blow), facts.append)
    seen = measure(facts)
    assert seen.mtbf == pytest.approx(outcome.record.spent.supervised / sum(seen.blows.values()))
    assert set(seen.blows) == set(Blow)
    for name, value in costs.__dict__.items():
        # a step more or less; and of the standby nothing is told
        if name not in ("detection", "replacement", "startup", "relaunch", "standby"):
            assert seen.costs[name] == pytest.approx(value, rel=0.1), name
    assert seen.snapshot_every == pytest.approx(30.0, rel=0.1)
    assert seen.checkpoint_every == pytest.approx(400.0, rel=0.01)
    again = simulate(plan, Costs(**{**costs.__dict__, **seen.costs}), poisson(DAY / 12, *Blow))
    assert again.goodput == pytest.approx(outcome.goodput, abs=0.03)


@pytest.mark.parametrize(("died", "launch"), [(109.0, 60.0), (111.0, 1.0)])
def test_a_failure_before_the_standby_waits_is_answered_by_a_cold_launch(died: float, launch: float) -> None:
    costs = Costs(
        step=1.0, startup=60.0, relaunch=1.0, standby=49.0, detection=0.0, teardown=0.0, restore=0.0, stall=0.0
    )  # fmt: skip
    facts: list[Fact] = []
    simulate(Plan(seconds=400.0, snapshot_every=1.0), costs, [Strike(died, Blow.PROCESS)], facts.append)
    first, again = (fact.time for fact in facts if isinstance(fact, FirstStep))
    assert first + costs.standby == 110.0
    assert again == died + launch + costs.step


def test_how_long_a_standby_takes_is_measured_from_the_first_step_on() -> None:
    facts: list[Fact] = [
        RunStarted(
            time=0, epoch=1, host="", pid=1, command=(), version="", max_failures=5, max_preemptions=5
        ),
        AttemptStarted(time=0, attempt=0),
        FirstStep(time=10, attempt=0, step=1),
        StandbyReady(time=17, attempt=1, seconds=5),
    ]
    assert measure(facts).costs["standby"] == 7


@pytest.mark.parametrize(
    "wrong",
    [{"step": 0.0}, {"step": -1.0}, {"step": 1.0, "drain": -1.0}, {"step": 1.0, "fetch": float("inf")}],
)
def test_costs_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"longer than 0|is no time"):
        Costs(**wrong)


@pytest.mark.parametrize(
    "wrong", [{}, {"seconds": 0.0}, {"seconds": 1.0, "snapshot_every": 0.0}, {"steps": -5}]
)
def test_plans_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"neither is given|more than 0"):
        Plan(**wrong)  # type: ignore[arg-type]
