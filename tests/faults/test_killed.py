"""SIGKILL at every moment of snapshots, drains, removals and saves: what was whole is there, and the end is bit for bit the same."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import collect, start

DEADLINE = 200.0

Sweep = Callable[[str], dict[str, Any]]


def sweep_in(root: Path, who: str) -> dict[str, Any]:
    """In a process that has torch imported, and nothing else on its mind."""
    from tests.faults import crashing

    return crashing.sweep(root, who)


@pytest.fixture
def sweep() -> Iterator[Sweep]:
    """In memory, where syncing costs nothing."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))

    def run(who: str) -> dict[str, Any]:
        with start(sweep_in, 1, root, who) as ranks:
            [result] = collect(ranks, DEADLINE)
        return result  # type: ignore[no-any-return]

    yield run
    shutil.rmtree(root)


@pytest.mark.parametrize("who", ["node", "worker"])
def test_a_job_killed_at_every_moment(who: str, sweep: Sweep) -> None:
    result = sweep(who)
    print(result)
    assert result["moments"] > 60
    assert result["killed"] > 0.9 * result["moments"]


def test_a_session_of_its_own_killed_at_every_moment(sweep: Sweep) -> None:
    result = sweep("session")
    print(result)
    assert result["moments"] > 30
    assert result["killed"] > 0.9 * result["moments"]
