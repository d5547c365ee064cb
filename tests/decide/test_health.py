"""Hangs are told from all that is none, and the rank at fault from those that wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide.health import (
    GAP,
    PAUSE,
    Health,
    Limits,
    Reading,
    Stage,
    accuse,
    judge,
    limit_of,
    observe,
    reason,
    start_again,
)
from supervisor.model import Hang, HangKind, HungRank

LIMITS = Limits(startup=100.0, floor=10.0, ceiling=50.0)
TICK = 0.25


def reading(rank: int = 0, **changes: object) -> Reading:
    usual = Reading(rank=rank, stage=Stage.STEP, step=5, progress=1, movement=1, beat=1, known=True)
    return replace(usual, **changes)  # type: ignore[arg-type]


def watch(
    seconds: float, *readings: Reading, health: Health | None = None, tick: float = TICK, start: float = 0.0
) -> Health:
    """The same readings for some time."""
    health = health if health is not None else Health()
    begin = health.looked if health.looked is not None else start
    for count in range(int(seconds / tick) + 1):
        health = observe(health, readings, begin + count * tick)
    return health


def found(health: Health, limits: Limits = LIMITS) -> Hang | None:
    return judge(health, limits, len(health.traces))


# --------------------------------------------------------------------------- what is a hang


def test_a_rank_that_waits_in_a_save_point_has_a_limit_though_no_save_was_ever_seen() -> None:
    """Saves of milliseconds fall between two looks; the others wait there for one that was stopped in its step."""
    health = watch(1, reading(0, longest_save=0.002), reading(1, longest_save=0.002))
    health = watch(
        9, reading(0, stage=Stage.SAVE, longest_save=0.002), reading(1, longest_save=0.002), health=health
    )
    assert found(health) is None
    health = watch(
        2, reading(0, stage=Stage.SAVE, longest_save=0.002), reading(1, longest_save=0.002), health=health
    )
    assert found(health) is not None
    slow = watch(20, reading(stage=Stage.SAVE, longest_save=3.0))
    assert found(slow) is None
    assert found(watch(11, reading(stage=Stage.SAVE, longest_save=3.0), health=slow)) is not None


@pytest.mark.parametrize(
    ("stage", "limit"),
    [
        (Stage.STARTUP, 100.0),
        (Stage.STEP, 10.0),
        (Stage.SAVE, 50.0),
        (Stage.ASIDE, 50.0),
        (Stage.LEAVING, 50.0),
    ],
)
def test_each_stage_has_its_limit(stage: Stage, limit: float) -> None:
    ranks = (reading(0, stage=stage), reading(1, stage=stage))
    assert found(watch(limit - 1, *ranks)) is None
    hang = found(watch(limit + 1, *ranks))
    assert hang is not None
    assert hang.limit == limit
    assert [rank.rank for rank in hang.ranks] == [0, 1]


def test_one_rank_with_a_sign_of_life_is_enough() -> None:
    health = Health()
    for count in range(400):
        health = observe(health, [reading(0), reading(1, movement=count)], count * TICK)
        assert found(health) is None


def test_a_rank_in_a_longer_stage_is_waited_for() -> None:
    ranks = (reading(0, stage=Stage.ASIDE), reading(1))
    assert found(watch(40, *ranks)) is None
    assert found(watch(51, *ranks)) is not None


def test_a_limit_of_ones_own_counts_progress_only() -> None:
    health, limits = Health(), replace(LIMITS, fixed=20.0)
    for count in range(84):
        health = observe(health, [reading(movement=count)], count * TICK)
    assert found(health) is None
    hang = found(health, limits)
    assert hang is not None
    assert hang.limit == 20.0
    aside = watch(30, reading(stage=Stage.ASIDE))
    assert found(aside, limits) is None


@pytest.mark.parametrize(
    "unjudged",
    [{"beat": 0}, {"known": False}, {"stage": Stage.OVER}],
    ids=["no torch", "never made a step", "after the training"],
)
def test_of_some_nothing_is_expected(unjudged: dict[str, object]) -> None:
    health = watch(500, reading(0, **unjudged), reading(1, **unjudged))
    assert found(health) is None
    assert found(watch(500, reading(0, **unjudged), reading(1))) is not None  # but their peers hang


def test_not_before_every_rank_is_there() -> None:
    assert judge(watch(500, reading(0)), LIMITS, 2) is None
    assert judge(Health(), LIMITS, None) is None


# --------------------------------------------------------------------------- limits are learned


def test_slow_steps_are_given_more_time() -> None:
    health = Health()
    for count in range(5):
        health = watch(3, reading(step=count, progress=count), health=health)
    assert limit_of(health.traces[0], LIMITS) == pytest.approx(30, abs=3)
    health = watch(40, reading(step=5, progress=5), health=health)
    health = watch(1, reading(step=6, progress=6), health=health)
    assert limit_of(health.traces[0], LIMITS) == LIMITS.ceiling


def test_the_first_step_teaches_nothing() -> None:
    """It compiles; the second is what a step takes."""
    health = watch(60, reading(stage=Stage.STARTUP, step=0))
    health = watch(1, reading(step=1, progress=2), health=health)
    assert limit_of(health.traces[0], LIMITS) == LIMITS.floor


def test_saves_teach_for_saves() -> None:
    health = watch(3, reading(stage=Stage.SAVE))
    health = watch(1, reading(progress=2), health=health)
    health = watch(1, reading(stage=Stage.SAVE, progress=3), health=health)
    assert limit_of(health.traces[0], LIMITS) == pytest.approx(30, abs=3)
    assert limit_of(health.traces[0], replace(LIMITS, floor=45.0)) == 45.0


# --------------------------------------------------------------------------- time that does not count


def test_a_pause_of_the_node_starts_all_limits_again() -> None:
    health = watch(9.5, reading())
    assert health.looked is not None
    health = observe(health, [reading()], health.looked + 3600)
    assert health.paused == 3600
    assert found(health) is None
    assert found(watch(9, reading(), health=health)) is None
    assert found(watch(12, reading(), health=health)) is not None


def test_a_gap_that_is_short_is_left_out() -> None:
    health = Health()
    for count in range(9):  # 9 looks, PAUSE seconds apart: each counts for GAP
        health = observe(health, [reading()], count * PAUSE)
        assert not health.paused
    assert health.clock == 8 * GAP
    assert found(health) is None


def test_a_clock_set_back_counts_nothing() -> None:
    health = observe(observe(Health(), [reading()], 100.0), [reading()], 50.0)
    assert health.clock == 0


def test_starting_again() -> None:
    health = start_again(watch(30, reading()))
    assert found(health) is None
    assert found(watch(11, reading(), health=health)) is not None


@given(
    st.lists(st.floats(0, 10_000, allow_nan=False), min_size=1, max_size=60),
    st.integers(1, 4),
    st.data(),
)
def test_no_hang_while_any_rank_shows_life_within_its_limit(
    gaps: Sequence[float], world: int, data: st.DataObject
) -> None:
    """Whatever gaps there are between two looks: at each of them some rank has moved."""
    health, now = Health(), 0.0
    marks = [0] * world
    for count, gap in enumerate(gaps, start=1):
        now += gap
        marks[data.draw(st.integers(0, world - 1))] = count
        readings = [reading(rank, movement=mark) for rank, mark in enumerate(marks)]
        health = observe(health, readings, now)
        assert found(health) is None


@given(st.lists(st.floats(0.01, 3000), min_size=1, max_size=200), st.floats(1, 60))
def test_a_hang_is_found_after_the_limit_and_never_before(gaps: Iterable[float], floor: float) -> None:
    health, now, limits = observe(Health(), [reading()], 0.0), 0.0, replace(LIMITS, floor=floor)
    for gap in gaps:
        now += gap
        health = observe(health, [reading()], now)
        if found(health, limits) is not None:
            assert now >= limits.floor or limits.floor > limits.ceiling
            break
    health = watch(70, reading(), health=health)
    assert found(health, limits) is not None


# --------------------------------------------------------------------------- who is at fault


def dump(*frames: str) -> str:
    lines = []
    for frame in frames:
        place, name = frame.split()
        file, line = place.split(":")
        lines.append(f'  File "{file}", line {line} in {name}')
    return "\n".join(["Current thread 0x00007f (most recent call first):", *lines, ""])


BACKWARD = dump("/v/site-packages/torch/autograd/graph.py:9 _engine_run_backward", "/u/train.py:8 main")
BARRIER = dump("/v/site-packages/torch/distributed/distributed_c10d.py:5 barrier", "/u/train.py:9 main")
LOADING = dump("/v/lib/python3.11/queue.py:180 get", "/u/data.py:3 load", "/u/train.py:7 main")
SLEEPING = dump("/u/train.py:5 strike", "/u/train.py:8 main")


def hung(*ranks: HungRank) -> Hang:
    return Hang(kind=HangKind.MAIN_THREAD, monotonic=1.0, limit=10.0, ranks=ranks)


def one(rank: int, **changes: object) -> HungRank:
    usual = HungRank(rank=rank, step=5, stage="step", quiet=11.0, beat_quiet=0.1)
    return replace(usual, **changes)  # type: ignore[arg-type]


def suspects(hang: Hang) -> list[int]:
    return [rank.rank for rank in hang.ranks if rank.suspect]


def test_the_stopped_one() -> None:
    ranks = (one(0), one(1, beat_quiet=11.0), one(2, step=3))
    hang = accuse(hung(*ranks), {1: "T"}, {0: BACKWARD, 2: LOADING})
    assert (hang.kind, suspects(hang)) == (HangKind.STOPPED, [1])
    assert reason(hang) == (
        "rank 1 hangs: the process was stopped (SIGSTOP) (after step 5, no sign of life for 11 s, 10 s are allowed); "
        "ranks 0, 2 wait at u/train.py:8 (main), in torch/autograd/graph.py:9 (_engine_run_backward)"
    )


def test_the_one_whose_interpreter_stands_still() -> None:
    hang = accuse(hung(one(0), one(1, beat_quiet=10.9)), {0: "S", 1: "S"}, {0: BACKWARD, 1: SLEEPING})
    assert (hang.kind, suspects(hang)) == (HangKind.GIL, [1])


def test_a_late_beat_is_no_stuck_lock() -> None:
    hang = accuse(hung(one(0), one(1, beat_quiet=1.9)), {}, {0: BACKWARD, 1: SLEEPING})
    assert (hang.kind, suspects(hang)) == (HangKind.MAIN_THREAD, [1])


def test_the_one_that_does_not_wait() -> None:
    hang = accuse(hung(one(0), one(1), one(2)), {}, {0: BACKWARD, 1: LOADING, 2: BARRIER})
    assert suspects(hang) == [1]
    assert (
        "rank 1 hangs at u/data.py:3 (load), in queue.py:180 (get): the main thread does not move"
        in reason(hang)
    )


def test_the_one_that_is_behind() -> None:
    hang = accuse(hung(one(0, step=6), one(1), one(2, step=6)), {}, {})
    assert suspects(hang) == [1]


def test_the_odd_one_out_of_many() -> None:
    hang = accuse(hung(one(0), one(1), one(2)), {}, {0: LOADING, 1: SLEEPING, 2: LOADING})
    assert suspects(hang) == [1]


def test_nobody_is_accused_without_evidence() -> None:
    hang = accuse(hung(one(0), one(1)), {}, {0: BACKWARD, 1: BARRIER})
    assert suspects(hang) == [0, 1]
    assert reason(hang).startswith("all ranks wait for one another, in collectives that do not match")
    hang = accuse(hung(one(0), one(1)), {}, {0: LOADING, 1: SLEEPING})
    assert "cannot be told" in reason(hang)


def test_a_wait_for_the_kernel_is_said() -> None:
    hang = accuse(hung(one(0), one(1)), {1: "D"}, {0: BACKWARD, 1: LOADING})
    assert "it waits for the kernel" in reason(hang)


def test_silence() -> None:
    hang = Hang(kind=HangKind.SILENT, monotonic=1.0, limit=600.0)
    assert reason(hang) == "no rank has written any output for 600 s (--hang-silence)"
