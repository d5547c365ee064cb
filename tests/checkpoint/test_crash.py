"""SIGKILL at every file operation: afterwards there are whole checkpoints, marked leftovers, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.checkpoint.catalog import list_checkpoints, newest_good, step_directory, sweep, verify
from supervisor.checkpoint.commit import drain
from supervisor.checkpoint.directory import begin
from supervisor.checkpoint.manifest import read_manifest
from supervisor.checkpoint.sharing import SMALLEST
from tests.checkpoint.tools import flip_bit, origin, write_source

ROOT = Path(__file__).parent.parent.parent
OLD, NEW = 100, 200


def leftover(checkpoints: Path) -> None:
    begin(step_directory(checkpoints, NEW))
    write_source(step_directory(checkpoints, NEW), seed=9)


def damaged(checkpoints: Path) -> None:
    good(checkpoints)
    flip_bit(step_directory(checkpoints, NEW) / "__0_0.distcp", 3)


def good(checkpoints: Path) -> None:
    drain(checkpoints.parent / "slot", step_directory(checkpoints, NEW), origin(NEW, attempt=1))


def nothing(checkpoints: Path) -> None:
    pass


def crash(scenario: str, before: Callable[[Path], None], root: Path) -> list[Path]:
    """What is left of ``scenario`` killed at its first, second, … last operation, and of the one that was not."""
    write_source(root / "template" / "slot", seed=1)
    drain(write_source(root / "old"), step_directory(root / "template" / "checkpoints", OLD), origin(OLD))
    before(root / "template" / "checkpoints")
    command = [sys.executable, "-m", "tests.checkpoint.crasher", scenario, str(root)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=200)
    return [root / str(moment) / "checkpoints" for moment in range(int(run.stdout) + 1)]


def listed(checkpoints: Path) -> list[int]:
    """Steps that are listed as good; they must be."""
    records = [record for record in list_checkpoints(checkpoints) if record.problem is None]
    for record in records:
        assert verify(record) == [], f"{record.path} is listed, and is not whole"
    return [record.step for record in records]


@pytest.mark.parametrize("scenario", ["drain_new", "drain_in_threads"])
@pytest.mark.parametrize("before", [nothing, leftover], ids=["fresh", "over a leftover"])
def test_a_killed_drain(tmp_path: Path, scenario: str, before: Callable[[Path], None]) -> None:
    crashes = crash(scenario, before, tmp_path)
    assert len(crashes) > 25
    outcomes = [listed(checkpoints) for checkpoints in crashes]
    assert set(map(tuple, outcomes)) == {(OLD,), (NEW, OLD)}
    assert outcomes[-1] == [NEW, OLD]
    for checkpoints, outcome in zip(crashes, outcomes, strict=True):
        assert newest_good(checkpoints)[0] is not None
        assert newest_good(checkpoints)[1] == []  # a leftover is not even a rejected one
        sweep(checkpoints)
        assert sorted(int(path.name[5:]) for path in checkpoints.iterdir()) == sorted(outcome)
        drain(checkpoints.parent / "slot", step_directory(checkpoints, NEW), origin(NEW))
        assert listed(checkpoints) == [NEW, OLD]


def frozen(checkpoints: Path) -> None:
    """The newest checkpoint and the snapshot to drain have a large file in common."""
    for directory in (checkpoints.parent / "slot", checkpoints.parent / "old"):
        write_source(directory, size=SMALLEST)
    write_source(checkpoints.parent / "slot", seed=1, ranks=1)
    drain(checkpoints.parent / "old", step_directory(checkpoints, OLD + 1), origin(OLD + 1))


def test_a_killed_drain_that_shares(tmp_path: Path) -> None:
    crashes = crash("drain_new", frozen, tmp_path)
    assert len(crashes) > 25
    outcomes = [listed(checkpoints) for checkpoints in crashes]
    assert set(map(tuple, outcomes)) == {(OLD + 1, OLD), (NEW, OLD + 1, OLD)}
    links = step_directory(crashes[-1], NEW) / "__1_0.distcp"
    assert links.stat().st_nlink == 2
    for checkpoints in crashes:
        sweep(checkpoints)
        drain(checkpoints.parent / "slot", step_directory(checkpoints, NEW), origin(NEW))
        assert listed(checkpoints) == [NEW, OLD + 1, OLD]


def test_a_killed_drain_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    crashes = crash("drain_new", damaged, tmp_path)
    outcomes = set()
    for checkpoints in crashes:
        manifest = newest_good(checkpoints)[0]
        assert manifest is not None
        outcomes.add(manifest.step)
        drain(checkpoints.parent / "slot", step_directory(checkpoints, NEW), origin(NEW))
        found, _ = newest_good(checkpoints)
        assert found is not None
        assert found.step == NEW
        assert read_manifest(found.path, None).origin.attempt == 2
    assert outcomes == {OLD, NEW}
    assert listed(crashes[-1]) == [NEW, OLD]
    assert len(list(crashes[-1].iterdir())) == 2


def test_a_killed_sealing(tmp_path: Path) -> None:
    crashes = crash("seal_new", nothing, tmp_path)
    assert len(crashes) > 15
    outcomes = [listed(checkpoints) for checkpoints in crashes]
    assert set(map(tuple, outcomes)) == {(OLD,), (NEW, OLD)}
    assert outcomes[-1] == [NEW, OLD]


def test_a_killed_removal(tmp_path: Path) -> None:
    crashes = crash("remove_new", good, tmp_path)
    assert len(crashes) > 8
    for number, checkpoints in enumerate(crashes):
        assert listed(checkpoints) == ([NEW, OLD] if number == 0 else [OLD])
        assert newest_good(checkpoints)[1] == []
        sweep(checkpoints)
        assert len(list(checkpoints.iterdir())) == len(listed(checkpoints))


def test_a_killed_sweep(tmp_path: Path) -> None:
    for checkpoints in crash("sweep_all", leftover, tmp_path):
        assert listed(checkpoints) == [OLD]
        sweep(checkpoints)
        assert [path.name for path in checkpoints.iterdir()] == [f"step-{OLD:09d}"]
