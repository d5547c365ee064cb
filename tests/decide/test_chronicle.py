from __future__ import annotations

import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import goodput, lifecycle
from supervisor.decide.chronicle import MOST_GONE, MOST_POINTS, Chronicle
from supervisor.decide.ribbon import ACTIVITIES, Ribbon
from supervisor.decide.thinning import m4
from supervisor.errors import ProtocolError
from supervisor.model import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointsPruned,
    Fact,
    FirstStep,
    Progress,
    Resumed,
    Tier,
)
from tests.journals import journals
from tests.report.stories import Story, life


def told(facts: list[Fact]) -> Chronicle:
    chronicle = Chronicle()
    for fact in facts:
        chronicle.add(fact)
    return chronicle


def sums(rows: list[list[float]]) -> list[float]:
    return [math.fsum(row[index] for row in rows) for index in range(len(ACTIVITIES))]


@given(journals())
def test_a_chronicle_agrees_with_the_record(facts: list[Fact]) -> None:
    """In every cell and entry. Every attempt of these journals has a Session; one that never made a step lost none."""
    chronicle = told(facts)
    record = lifecycle.fold(facts)
    assert chronicle.record == record
    ribbon, sheets = chronicle.sheets()
    whole = list(asdict(record.spent).values())
    assert [activity.value for activity in ACTIVITIES] == list(asdict(record.spent))
    for rows in (ribbon.rows, sheets):
        assert sums(rows) == pytest.approx(whole, abs=1e-5)
        assert min((min(row) for row in rows), default=0.0) > -1e-6
    assert len(sheets) == 1 + len(chronicle.courses)
    assert sum(course.lost for course in chronicle.courses) == record.lost_steps
    for course in chronicle.courses[:-1]:
        assert course.outcome in ("finished", "stopped", "failed", "cut off")
        assert (course.outcome == "failed") == (course.failure is not None)
        assert course.ended is not None


@given(journals(), st.floats(0, 1e6))
def test_the_time_since_the_last_fact_belongs_to_a_job_that_is_alive(facts: list[Fact], later: float) -> None:
    chronicle = told(facts)
    record = chronicle.record
    now = (record.last_time or 0.0) + later
    ribbon, sheets = chronicle.sheets(now, record.step + 3)
    whole = list(asdict(goodput.at(record, record.step + 3, now)).values())
    assert sums(ribbon.rows) == pytest.approx(whole, abs=1e-5)
    assert sums(sheets) == pytest.approx(whole, abs=1e-5)
    assert sums(chronicle.ribbon.rows) == pytest.approx(list(asdict(record.spent).values()), abs=1e-5)


def test_an_impossible_fact_changes_nothing() -> None:
    facts = life(attempts=2, total=100, every=10, pace=1.0)
    chronicle = told(facts)
    before = chronicle.sheets()[1]
    with pytest.raises(ProtocolError):
        chronicle.add(AttemptStarted(time=9e9, attempt=0))
    assert chronicle.sheets()[1] is before
    assert len(chronicle.courses) == 2


def test_a_ribbon_of_a_year_has_as_many_columns_as_one_of_an_hour() -> None:
    story = Story()
    story.run(1)
    story.attempt(0, 0, 20, 100, every=1, pace=0.5)
    story.time += 365 * 86400.0
    story.run(2)
    chronicle = told(story.facts)
    assert len(chronicle.ribbon.rows) <= 480
    whole = chronicle.record.spent.total
    assert whole > 365 * 86400
    assert 0 <= len(chronicle.ribbon.rows) * chronicle.ribbon.width - whole < 2 * chronicle.ribbon.width


def test_a_ribbon_puts_seconds_where_their_time_was() -> None:
    story = Story()
    story.run(1)
    story.attempt(0, 0, 21, 100, every=1, pace=1.0)  # 25 s of start-up, 20 of steps
    ribbon = told(story.facts).ribbon
    assert isinstance(ribbon, Ribbon)
    names = [activity.value for activity in ACTIVITIES]
    startup, productive = names.index("startup"), names.index("productive")
    at = [(index * ribbon.width, row) for index, row in enumerate(ribbon.rows)]
    assert all(not row[productive] for begin, row in at if begin + ribbon.width <= 25)
    assert all(not row[startup] for begin, row in at if begin >= 25)


def test_lost_steps_are_those_beyond_where_a_later_attempt_resumed() -> None:
    story = Story()
    story.run(1)
    story.attempt(0, 0, 100, 200, every=10, pace=1.0)
    story.fail(0, 100, "broke")
    story.attempt(1, 80, 90, 200, every=5, pace=1.0)
    story.fail(1, 90, "broke")
    story.attempt(2, 40, 200, 200, every=10, pace=1.0)
    story.finish(2, 200)
    chronicle = told(story.facts)
    first, second, third = chronicle.courses
    assert (first.kept, second.kept, third.kept) == (40, 40, None)
    assert (first.lost, second.lost, third.lost) == (60, 10, 0)
    assert chronicle.record.lost_steps == 70
    assert [course.outcome for course in chronicle.courses] == ["failed", "failed", "finished"]


def test_what_becomes_of_a_checkpoint() -> None:
    story = Story()
    story.run(1)
    story.attempt(0, 0, 60, 100, every=10, pace=1.0)
    for step in (10, 20, 30, 40):
        story.facts.append(CheckpointCommitted(time=story.time, attempt=0, step=step, path=f"/c/{step}", seconds=1.0, bytes=5))  # fmt: skip
    story.facts += [
        CheckpointCommitted(time=story.time, attempt=0, step=20, path="/c/20", seconds=1.0, bytes=6),
        CheckpointsPruned(time=story.time, steps=(10,)),
        CheckpointRejected(time=story.time, path="/c/40", reason="a bit was flipped"),
    ]
    story.fail(0, 60, "broke")
    story.facts += [
        AttemptStarted(time=story.time, attempt=1),
        Resumed(time=story.time, attempt=1, step=30, tier=Tier.CHECKPOINT, path="/c/30"),
    ]
    chronicle = told(story.facts)
    states = [(stored.fact.step, stored.fact.bytes, stored.state) for stored in chronicle.checkpoints]
    assert states == [
        (10, 5, "pruned"), (20, 5, "replaced"), (30, 5, "verified"), (40, 5, "damaged"), (20, 6, "kept"),
    ]  # fmt: skip
    assert chronicle.checkpoints[3].problem == "a bit was flipped"
    assert chronicle.checkpoints_made == 5


def test_of_checkpoints_that_are_gone_only_the_newest_are_told() -> None:
    story = Story()
    story.run(1)
    story.attempt(0, 0, 2, 10_000, every=1, pace=1.0)
    for step in range(3 * MOST_GONE):
        story.commit(0, step)
    chronicle = told(story.facts)
    assert chronicle.checkpoints_made == 3 * MOST_GONE
    assert len(chronicle.checkpoints) <= 2 * MOST_GONE + 4
    assert [stored.fact.step for stored in chronicle.checkpoints if stored.state == "kept"] == story.kept
    assert chronicle.checkpoints[-1].fact.step == 3 * MOST_GONE - 1


def test_a_long_way_is_thinned_and_keeps_its_ends() -> None:
    chronicle = told(life(attempts=1, total=5000, every=1, pace=1.0))
    (course,) = chronicle.courses
    assert len(course.times) <= MOST_POINTS
    assert (course.steps[0], course.steps[-1]) == (1, 5000)
    assert course.steps == sorted(course.steps)
    assert course.times == sorted(course.times)


def test_a_value_that_is_told_twice_is_one() -> None:
    """As an attempt's last ones may be: same step, newest metrics."""
    story = Story()
    story.run(1)
    story.attempt(0, 0, 2, 10, every=1, pace=1.0)
    story.facts.append(Progress(time=story.time, attempt=0, step=10, metrics={"acc": 3.0}))
    story.facts.append(AttemptEnded(time=story.time, attempt=0, step=10, metrics={"acc": 2.5}))
    values = told(story.facts).metrics["acc"]
    assert (list(values.steps), list(values.values)) == ([10], [2.5])
    assert told(story.facts).record.metrics["acc"] == 2.5


def test_an_attempt_whose_supervisor_was_killed_is_cut_off() -> None:
    story = Story()
    story.run(1)
    story.attempt(0, 0, 20, 100, every=1, pace=1.0)
    died = story.time
    story.time += 1000.0
    story.run(2)
    (course,) = told(story.facts).courses
    assert course.outcome == "cut off"
    assert course.ended == died


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(-1e3, 1e3)), min_size=1), st.integers(1, 50))
def test_thinning_keeps_ends_and_extremes_of_every_column(
    points: list[tuple[int, float]], columns: int
) -> None:
    points.sort(key=lambda point: point[0])
    xs, ys = [x for x, _ in points], [y for _, y in points]
    kept = m4(xs, ys, 0, 1000, columns)
    assert kept == sorted(set(kept))
    assert {0, len(xs) - 1} <= set(kept)
    assert len(kept) <= max(4, 4 * columns)
    whole: dict[int, list[float]] = {}
    for x, y in points:
        whole.setdefault(min(columns - 1, x * columns // 1000), []).append(y)
    shown: dict[int, list[float]] = {}
    for index in kept:
        shown.setdefault(min(columns - 1, xs[index] * columns // 1000), []).append(ys[index])
    assert {at: (min(v), max(v)) for at, v in shown.items()} == {
        at: (min(v), max(v)) for at, v in whole.items()
    }


def test_thinning_needs_columns() -> None:
    with pytest.raises(ValueError, match="0 columns"):
        m4([1.0], [1.0], 0, 1, 0)


def test_a_first_step_without_a_session_loses_nothing() -> None:
    story = Story()
    story.run(1)
    for number in (0, 1):
        story.facts += [
            AttemptStarted(time=story.time, attempt=number),
            FirstStep(time=story.time + 1, attempt=number, step=1),
        ]
        story.time += 20
        story.facts.append(Progress(time=story.time, attempt=number, step=50))
        story.fail(number, 50, "broke")
    assert [course.lost for course in told(story.facts).courses] == [0, 0]
