"""The engine under a supervisor, on several ranks: whatever snapshot a run resumes from, it ends on the same bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import RankError, collect, launch, start
from tests.training.programs.engine import drafted, save_and_load_after_an_evaluation, tear
from tests.training.programs.trainings import Plan, train
from tests.training.station import Station

WIDE = Plan(kind="ddp", width=300, steps=12)  # matrices of 360 kB, and small ones


def digests(results: list[Any]) -> list[str]:
    return [result["digest"] for result in results]


@pytest.mark.parametrize(
    ("plan", "world"),
    [
        (WIDE, 2),
        (replace(WIDE, kind="fsdp"), 2),
        (replace(WIDE, kind="plain"), 1),
        (replace(WIDE, kind="fsdp", width=31), 3),  # uneven shards, some empty
        (replace(WIDE, accumulate=-3), 2),
    ],
    ids=["ddp", "fsdp", "plain", "uneven", "accumulation"],
)
def test_every_snapshot_resumes_to_the_same_bits(plan: Plan, world: int, tmp_path: Path) -> None:
    expected = digests(launch(train, world, replace(plan, session=False)))
    station = Station(tmp_path / "r", world, every=(1,), keep=tmp_path / "kept")
    assert digests(launch(train, world, plan, environ=station.environ)) == expected
    kept = sorted(int(path.name) for path in (tmp_path / "kept").iterdir())
    assert len(kept) >= 3
    assert not station.of_kind("save_failed")
    for step in (kept[0], kept[-3], kept[-2]):
        again = Station(
            tmp_path / f"from-{step}", world, every=(1,), resume=(tmp_path / "kept" / str(step), step)
        )
        results = launch(train, world, plan, environ=again.environ)
        assert {result["start"] for result in results} == {step}
        assert digests(results) == expected, f"resumed at {step}"


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_layouts_drafted_behind_the_training(kind: str, tmp_path: Path) -> None:
    plan = replace(WIDE, kind=kind, steps=40)
    expected = digests(launch(train, 2, replace(plan, session=False)))
    station = Station(tmp_path / "r", 2, every=(1,), keep=tmp_path / "kept")
    assert digests(launch(drafted, 2, plan, environ=station.environ)) == expected
    kept = sorted(int(path.name) for path in (tmp_path / "kept").iterdir())
    assert kept[-1] == plan.steps
    assert 1 not in kept, "put off until it was planned"
    assert not station.of_kind("save_failed")
    resume = tmp_path / "kept" / str(kept[0]), kept[0]
    again = Station(tmp_path / "s", 2, every=(1,), resume=resume)
    assert digests(launch(drafted, 2, plan, environ=again.environ)) == expected


def test_killed_while_copying(tmp_path: Path) -> None:
    plan = replace(WIDE, width=2000, steps=9)
    expected = digests(launch(train, 2, replace(plan, session=False)))
    station = Station(tmp_path / "r", 2, every=(1,))
    with start(train, 2, replace(plan, kill_at=6), environ=station.environ) as ranks:
        collect(ranks)
    assert station.newest is not None
    again = Station(tmp_path / "s", 2, every=(1,), resume=station.newest)
    results = launch(train, 2, plan, environ=again.environ)
    assert {result["start"] for result in results} == {station.newest[1]}
    assert digests(results) == expected


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_files_of_two_steps_are_refused_by_all_ranks(kind: str, tmp_path: Path) -> None:
    """Of the same layout, so that no size tells."""
    plan = replace(WIDE, kind=kind, steps=6)
    station = Station(tmp_path / "r", 2, every=(1,), keep=tmp_path / "kept")
    launch(train, 2, plan, environ=station.environ)
    older, newer = sorted((tmp_path / "kept").iterdir(), key=lambda path: int(path.name))[-2:]
    shutil.copy(older / "__1_0.distcp", newer / "__1_0.distcp")
    again = Station(tmp_path / "s", 2, every=(1,), resume=(newer, int(newer.name)))
    with pytest.raises(RankError, match=f"holds step {older.name}, not {newer.name}"):
        launch(train, 2, plan, environ=again.environ)
    assert {message["damaged"] for message in again.of_kind("rejected")} == {True}


def test_torn_on_one_rank_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2, every=(1,))
    torn = launch(tear, 2, 14, 8, environ=station.environ)
    failed = station.of_kind("save_failed")
    assert [(m["step"], m["torn"]) for m in failed] == [(torn[1], True)]
    saved = [m["step"] for m in station.of_kind("saved")]
    assert saved.count(torn[1]) == 1, "by the other rank"
    assert {step: saved.count(step) for step in saved if step > torn[1]}
    assert saved.count(14) == 2


def test_after_an_evaluation_that_left_fsdp_in_one_piece(tmp_path: Path) -> None:
    assert launch(save_and_load_after_an_evaluation, 2, str(tmp_path / "0")) == [True, True]


def test_slots_made_ready_ahead_leave_a_snapshot_alone(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 1, every=(2,))
    plan = replace(WIDE, kind="plain", steps=3)
    launch(train, 1, plan, environ=station.environ)
    other = tmp_path / "s" / "slots" / "1"
    (station.slot(0) / "slot.json").touch()
    shutil.copytree(station.slot(0), other)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    again = Station(tmp_path / "s", 1, every=(3,))
    launch(train, 1, plan, environ=again.environ)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    made = again.slot(2) / "__0_0.distcp"  # not begun if the training left first
    assert not made.exists() or made.stat().st_size == (again.slot(0) / made.name).stat().st_size
