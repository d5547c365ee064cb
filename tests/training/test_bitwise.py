"""A Session changes no bit, and what it resumes ends where the same script ends that never heard of one.

Every resume is in fresh processes, and every comparison is with the script *without* a Session, on every rank: weights,
buffers, optimizers, scheduler, loader and the random state of Python, numpy and torch.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import launch
from tests.training.programs.trainings import Plan, train


def outcomes(results: list[Any]) -> list[str]:
    return [result["digest"] for result in results]


def resumed_from(plan: Plan, world: int, step: int, tmp_path: Path) -> list[Any]:
    """The results of a run that resumes at ``step`` from the checkpoints in ``plan.dir``."""
    assert plan.dir is not None
    root = tmp_path / f"from-{step}"
    name = f"step-{step:09d}"
    shutil.copytree(Path(plan.dir) / "checkpoints" / name, root / "checkpoints" / name)
    results = launch(train, world, replace(plan, dir=str(root), every="never"))
    assert [result["start"] for result in results] == [step] * world
    return results


def check(plan: Plan, world: int, steps: list[int], tmp_path: Path) -> None:
    """Undisturbed with a Session, and resumed at each of ``steps``: all as without a Session."""
    expected = outcomes(launch(train, world, replace(plan, session=False)))
    plan = replace(plan, dir=str(tmp_path / "job"))
    assert outcomes(launch(train, world, plan)) == expected, "a Session changed the training"
    for step in steps:
        assert outcomes(resumed_from(plan, world, step, tmp_path)) == expected, f"resumed at {step}"


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize(
    "loader",
    [{}, {"workers": 2}, {"own_generator": True}, {"workers": 2, "persistent": True, "own_generator": True}],
    ids=["workers0", "workers2", "generator", "persistent"],
)
def test_loader_at_every_step_of_two_epochs(loader: dict[str, Any], lazy: bool, tmp_path: Path) -> None:
    plan = Plan(steps=8, lazy=lazy, **loader)  # three steps an epoch
    check(plan, 1, list(range(1, 8)), tmp_path)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ddp(world: int, tmp_path: Path) -> None:
    plan = Plan(kind="ddp", width=64, depth=4, bucket_mb=0.02, steps=7)
    check(plan, world, [2, 3, 5], tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"broadcast_buffers": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ddp_options(options: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan(kind="ddp", width=64, depth=4, bucket_mb=0.02, steps=6, ddp=tuple(options.items()))
    check(plan, 3, [3, 4], tmp_path)  # a static graph rebuilds its buckets a step later than others


@pytest.mark.parametrize("world", [2, 3])
def test_fsdp2(world: int, tmp_path: Path) -> None:
    check(Plan(kind="fsdp", steps=6), world, [1, 4], tmp_path)


def test_workers_and_ranks(tmp_path: Path) -> None:
    check(Plan(kind="ddp", workers=2, steps=6), 2, [3, 4], tmp_path)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_several_backward_passes_a_step(kind: str, tmp_path: Path) -> None:
    check(Plan(kind=kind, accumulate=2, steps=5), 2, [2, 3], tmp_path)


def test_accumulation_over_steps_is_saved_when_no_gradient_is_pending(tmp_path: Path) -> None:
    plan = Plan(kind="ddp", accumulate=-3, steps=11, every="2steps")
    expected = outcomes(launch(train, 2, replace(plan, session=False)))
    plan = replace(plan, dir=str(tmp_path / "job"))
    assert outcomes(launch(train, 2, plan)) == expected
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "job" / "checkpoints").iterdir())
    assert saved == [3, 6, 9, 11]  # those of 2, 4 and 8 waited; 10 waited for the last step
    for step in (3, 6, 9):
        assert outcomes(resumed_from(plan, 2, step, tmp_path)) == expected


def test_killed_three_times(tmp_path: Path) -> None:
    plan = Plan(kind="ddp", width=64, depth=4, bucket_mb=0.02, steps=9)
    expected = outcomes(launch(train, 3, replace(plan, session=False)))
    plan = replace(plan, dir=str(tmp_path / "job"))
    for step in (1, 4, 7):
        assert -9 in launch(train, 3, replace(plan, kill_at=step))
    results = launch(train, 3, plan)
    assert outcomes(results) == expected
    assert 4 <= results[0]["start"] <= 7
