from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import goodput, lifecycle
from supervisor.model import (
    Action,
    AttemptEnded,
    AttemptStarted,
    Decided,
    Fact,
    FirstStep,
    JobRecord,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
)
from tests.journals import journals


def run(time: float, epoch: int = 1) -> RunStarted:
    return RunStarted(
        time=time, epoch=epoch, host="h", pid=1, command=(), version="0", max_failures=9, max_preemptions=9
    )


def attempt(
    number: int, start: float, resume: int | None, first: float, *progress: tuple[float, int]
) -> list[Fact]:
    """An attempt launched at ``start``, with its first step at ``first`` and the given (time, step) signs of life."""
    resumed = [] if resume is None else [Resumed(time=start, attempt=number, step=resume)]
    return [
        AttemptStarted(time=start, attempt=number),
        *resumed,
        FirstStep(time=first, attempt=number, step=(resume or 0) + 1),
        *(Progress(time=time, attempt=number, step=step) for time, step in progress),
    ]


def crashed(number: int, time: float, step: int) -> list[Fact]:
    return [
        AttemptEnded(time=time, attempt=number, step=step),
        Decided(time=time, attempt=number, action=Action.RESTART, reason=""),
    ]


def seconds(facts: list[Fact]) -> tuple[float, float]:
    record = lifecycle.fold(facts)
    return record.productive_seconds, record.supervised_seconds


def test_launch_and_first_step_are_overhead() -> None:
    assert seconds([run(0), *attempt(0, 5, 0, 20, (120, 101))]) == (100, 120)


def test_what_is_lost_does_not_count() -> None:
    first = [run(0), *attempt(0, 0, 0, 0, (100, 100)), *crashed(0, 100, 100)]
    record = lifecycle.fold([*first, *attempt(1, 110, 75, 120)])
    assert record.lost_steps == 25
    assert record.productive_seconds == pytest.approx(75)
    assert goodput.ratio(record.productive_seconds, record.supervised_seconds) == pytest.approx(75 / 120)


def test_resuming_where_it_died_loses_nothing() -> None:
    first = [run(0), *attempt(0, 0, 0, 0, (100, 100)), *crashed(0, 100, 100)]
    record = lifecycle.fold([*first, *attempt(1, 110, 100, 120, (130, 111))])
    assert (record.lost_steps, record.productive_seconds) == (0, pytest.approx(110))


def test_a_loss_deeper_than_the_last_stretch_reaches_into_the_ones_before() -> None:
    facts = [run(0), *attempt(0, 0, 0, 0, (100, 100)), *crashed(0, 100, 100)]
    facts += [*attempt(1, 100, 100, 100, (150, 150)), *crashed(1, 150, 150)]
    record = lifecycle.fold([*facts, *attempt(2, 150, 50, 150)])
    assert record.lost_steps == 100
    assert record.productive_seconds == pytest.approx(50)  # half of the first stretch, none of the second


def test_losing_everything_leaves_nothing() -> None:
    facts = [run(0), *attempt(0, 0, 0, 0, (100, 100)), *crashed(0, 100, 100), *attempt(1, 100, 0, 100)]
    assert seconds(facts)[0] == pytest.approx(0)


def test_a_loss_is_counted_once_even_if_the_next_attempt_dies_at_once() -> None:
    facts = [run(0), *attempt(0, 0, 0, 0, (100, 100)), *crashed(0, 100, 100)]
    facts += [
        AttemptStarted(time=100, attempt=1),
        Resumed(time=100, attempt=1, step=60),
        *crashed(1, 101, 60),
    ]
    record = lifecycle.fold(
        [*facts, AttemptStarted(time=101, attempt=2), Resumed(time=101, attempt=2, step=60)]
    )
    assert (record.lost_steps, record.productive_seconds) == (40, pytest.approx(60))


def test_steps_between_the_last_sign_of_life_and_the_end_count_at_the_attempts_own_pace() -> None:
    facts = [run(0), *attempt(0, 0, 0, 0, (10, 11))]  # one second a step
    ended = lifecycle.fold([*facts, AttemptEnded(time=100, attempt=0, step=16)])
    assert ended.productive_seconds == pytest.approx(15)
    stuck = lifecycle.fold([*facts, AttemptEnded(time=100, attempt=0, step=11)])
    assert stuck.productive_seconds == pytest.approx(10)


@pytest.mark.parametrize("closed", [True, False])
def test_the_gap_between_two_runs_is_nobodys(closed: bool) -> None:
    facts: list[Fact] = [run(0), *attempt(0, 0, 0, 0, (100, 100))]
    if closed:
        facts.append(RunEnded(time=100, exit_code=75, reason=""))
    facts += [run(5000, epoch=2), *attempt(1, 5000, 100, 5010, (5020, 120))]
    assert seconds(facts) == (pytest.approx(110), pytest.approx(120))


def test_a_killed_supervisors_steps_are_lost_too() -> None:
    facts = [run(0), *attempt(0, 0, 0, 0, (100, 100)), run(900, epoch=2), *attempt(1, 900, 80, 900)]
    assert lifecycle.fold(facts).lost_steps == 20


def test_without_a_session_every_attempts_steps_are_its_own() -> None:
    facts = [run(0), *attempt(0, 0, None, 0, (100, 100)), *crashed(0, 100, 100)]
    record = lifecycle.fold([*facts, *attempt(1, 100, None, 100, (110, 11))])
    assert (record.step, record.lost_steps, record.productive_seconds) == (11, 0, pytest.approx(110))


def test_a_clock_set_back_stands_still() -> None:
    facts = [run(100), *attempt(0, 90, 0, 95, (200, 50), (150, 60), (210, 70))]
    assert seconds(facts) == (110, 110)


def test_the_rate_follows_the_present() -> None:
    record = lifecycle.fold([run(0), *attempt(0, 0, 0, 0, (60, 61))])
    assert record.rate == pytest.approx(1.0)
    slower = lifecycle.fold(
        [Progress(time=60 + 10 * n, attempt=0, step=61 + n) for n in range(1, 60)], record
    )
    assert slower.rate == pytest.approx(0.1, abs=0.01)


def test_looking_at_a_live_job_does_not_wait_for_its_next_fact() -> None:
    record = lifecycle.fold([run(0), *attempt(0, 0, 0, 10, (20, 11))])
    assert goodput.at(record, 31, 40) == (30, 40)
    assert goodput.at(record, 11, 40) == (10, 40)  # no step since


def test_ratio_of_nothing() -> None:
    assert goodput.ratio(0, 0) == 0
    assert goodput.ratio(5, 4) == 1


@given(journals(), st.integers(0, 500), st.floats(-1e4, 1e7))
def test_goodput_is_a_fraction_whenever_it_is_looked_at(facts: list[Fact], step: int, later: float) -> None:
    record = lifecycle.fold(facts)
    productive, supervised = goodput.at(record, step, (record.last_time or 0) + later)
    assert 0 <= productive <= supervised + 1e-6 * max(1, supervised)
    assert 0 <= goodput.ratio(productive, supervised) <= 1


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_loss_never_makes_time(
    furthest: int, stretch: int, resume: int, before: float, within: float
) -> None:
    record = JobRecord(
        furthest_step=furthest,
        stretch_step=min(stretch, furthest),
        productive_seconds=before + within,
        stretch_seconds=within,
    )
    after = goodput.resumed(record, resume)
    assert 0 <= after.productive_seconds <= record.productive_seconds + 1e-6
    assert after.lost_steps == max(0, furthest - resume)
    assert replace(after, lost_steps=0) == replace(goodput.resumed(after, resume), lost_steps=0)
