from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from supervisor.decide import goodput, lifecycle
from supervisor.model import (
    Action,
    AttemptEnded,
    AttemptStarted,
    Decided,
    Fact,
    Failure,
    FailureKind,
    FirstStep,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
    SnapshotCompleted,
)
from supervisor.record import JobRecord
from supervisor.timesheet import Timesheet
from tests.journals import journals

FAILURE = Failure(kind=FailureKind.CRASH, reason="", attempt=0, time=0)


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
    return record.spent.productive, record.spent.supervised


def test_launch_and_first_step_are_overhead() -> None:
    assert seconds([run(0), *attempt(0, 5, 0, 20, (120, 101))]) == (100, 120)


def test_what_is_lost_does_not_count() -> None:
    first = [run(0), *attempt(0, 0, 0, 0, (100, 100)), *crashed(0, 100, 100)]
    record = lifecycle.fold([*first, *attempt(1, 110, 75, 120)])
    assert record.lost_steps == 25
    assert record.spent.productive == pytest.approx(75)
    assert record.spent.goodput == pytest.approx(75 / 120)


def test_resuming_where_it_died_loses_nothing() -> None:
    first = [run(0), *attempt(0, 0, 0, 0, (100, 100)), *crashed(0, 100, 100)]
    record = lifecycle.fold([*first, *attempt(1, 110, 100, 120, (130, 111))])
    assert (record.lost_steps, record.spent.productive) == (0, pytest.approx(110))


def test_a_loss_deeper_than_the_last_stretch_reaches_into_the_ones_before() -> None:
    facts = [run(0), *attempt(0, 0, 0, 0, (100, 100)), *crashed(0, 100, 100)]
    facts += [*attempt(1, 100, 100, 100, (150, 150)), *crashed(1, 150, 150)]
    record = lifecycle.fold([*facts, *attempt(2, 150, 50, 150)])
    assert record.lost_steps == 100
    assert record.spent.productive == pytest.approx(50)  # half of the first stretch, none of the second


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
    assert (record.lost_steps, record.spent.productive) == (40, pytest.approx(60))


def test_steps_between_the_last_sign_of_life_and_the_end_count_at_the_attempts_own_pace() -> None:
    facts = [run(0), *attempt(0, 0, 0, 0, (10, 11))]  # one second a step
    ended = lifecycle.fold([*facts, AttemptEnded(time=100, attempt=0, step=16)])
    assert ended.spent.productive == pytest.approx(15)
    stuck = lifecycle.fold([*facts, AttemptEnded(time=100, attempt=0, step=11)])
    assert stuck.spent.productive == pytest.approx(10)


def test_what_comes_after_the_end_was_noticed_is_not_productive() -> None:
    end = AttemptEnded(time=31.25, attempt=0, step=21, failure=FAILURE, noticed=31)
    known = lifecycle.fold([run(0), *attempt(0, 0, 0, 10, (20, 11)), end]).spent  # one second a step
    assert known == Timesheet(productive=20, startup=10, detection=1, teardown=0.25)
    unknown = lifecycle.fold([run(0), *attempt(0, 0, 0, 10), end]).spent  # no pace is known
    assert unknown == Timesheet(productive=21, startup=10, teardown=0.25)


def test_the_time_since_a_step_that_was_the_last_is_detection() -> None:
    begun = [run(0), *attempt(0, 0, 0, 10)]
    hang = [
        Progress(time=20, attempt=0, step=5, stepped=14),
        Progress(time=30, attempt=0, step=5, stepped=14),
        AttemptEnded(time=32, attempt=0, step=5, failure=FAILURE, noticed=31),
    ]
    known = lifecycle.fold([*begun, *hang]).spent
    assert known == Timesheet(productive=4, startup=10, detection=17, teardown=1)
    slow = [
        Progress(time=20, attempt=0, step=5, stepped=14),
        Progress(time=30, attempt=0, step=6, stepped=29),
    ]
    assert lifecycle.fold([*begun, *slow]).spent == Timesheet(productive=19, startup=10, detection=1)
    odd = [Progress(time=20, attempt=0, step=5, stepped=3), Progress(time=30, attempt=0, step=6, stepped=99)]
    assert lifecycle.fold([*begun, *odd]).spent == Timesheet(
        productive=20, startup=10
    )  # a clock that was set


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
    assert (record.step, record.lost_steps, record.spent.productive) == (11, 0, pytest.approx(110))


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
    assert goodput.at(record, 31, 40) == Timesheet(productive=30, startup=10)
    assert goodput.at(record, 11, 40) == Timesheet(productive=10, startup=10, detection=20)  # no step since


def test_each_activity_of_a_life_with_a_crash() -> None:
    """Launched at 2, first step at 10 (3 s of it to read the state); dies at 30.5, noticed at 31, gone at 31.25."""
    facts: list[Fact] = [
        run(0),
        *attempt(0, 2, 0, 10),
        SnapshotCompleted(time=20, attempt=0, step=11, seconds=0.5, bytes=1, stalled=2.0),
        Progress(time=30, attempt=0, step=21),
        AttemptEnded(time=31.25, attempt=0, step=21, failure=FAILURE, noticed=31),
        Decided(time=31.25, attempt=0, action=Action.RESTART, reason="", delay=4),
        AttemptStarted(time=35.25, attempt=1),
        Resumed(time=36, attempt=1, step=11),
        FirstStep(time=40, attempt=1, step=12, restore_seconds=3),
        Progress(time=50, attempt=1, step=22),
        AttemptEnded(time=52, attempt=1, step=22, finished=True),
        Decided(time=53, attempt=1, action=Action.COMPLETE, reason=""),
        RunEnded(time=53.5, exit_code=0, reason=""),
    ]
    spent = lifecycle.fold(facts).spent
    assert spent == Timesheet(
        productive=pytest.approx(18 * 11 / 21 + 10),  # the first stretch: 18 s without the stall, 21 steps
        redone=pytest.approx(18 * 10 / 21),
        snapshot=pytest.approx(2),
        startup=pytest.approx(10 + 4.75 - 3),
        detection=pytest.approx(1),
        teardown=pytest.approx(0.25 + 3.5),
        restore=pytest.approx(3),
        stopped=pytest.approx(4),
    )


def test_an_attempt_that_never_made_a_step() -> None:
    facts = [run(0), AttemptStarted(time=1, attempt=0)]
    ended = lifecycle.fold([*facts, AttemptEnded(time=9, attempt=0, step=None, failure=FAILURE, noticed=7)])
    assert ended.spent == Timesheet(startup=7, teardown=2)


def test_ratio_of_nothing() -> None:
    assert Timesheet().goodput == 0
    assert Timesheet(stopped=9).goodput == 0


@given(journals(), st.integers(0, 500), st.floats(-1e4, 1e7))
def test_goodput_is_a_fraction_whenever_it_is_looked_at(facts: list[Fact], step: int, later: float) -> None:
    record = lifecycle.fold(facts)
    spent = goodput.at(record, step, (record.last_time or 0) + later)
    assert all(seconds >= -1e-6 * max(1, spent.total) for seconds in spent.__dict__.values())
    assert 0 <= spent.goodput <= 1


@given(journals())
def test_every_second_is_put_down_once(facts: list[Fact]) -> None:
    assume(facts)
    wall, latest = 0.0, facts[0].time
    for fact in facts:  # a clock set back stands still
        wall, latest = wall + max(0.0, fact.time - latest), max(latest, fact.time)
    assert lifecycle.fold(facts).spent.total == pytest.approx(wall, abs=1e-6 * max(1.0, wall))


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_loss_never_makes_time(
    furthest: int, stretch: int, resume: int, before: float, within: float
) -> None:
    record = JobRecord(
        furthest_step=furthest,
        stretch_step=min(stretch, furthest),
        spent=Timesheet(productive=before + within),
        stretch_seconds=within,
    )
    after = goodput.resumed(record, resume)
    assert 0 <= after.spent.productive <= record.spent.productive + 1e-6
    assert after.lost_steps == max(0, furthest - resume)
    assert replace(after, lost_steps=0) == replace(goodput.resumed(after, resume), lost_steps=0)
