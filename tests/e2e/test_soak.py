"""Kill after kill, and nothing is left behind: the bounded version of ``make soak``."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import soak
from benchmarks.soak import Count
from tests.e2e import harness


def test_15_failures_in_a_row_leave_nothing_behind() -> None:
    result = subprocess.run(
        [sys.executable, "benchmarks/soak.py", "--light", "--kills", "15", "--seed", "3"],
        cwd=harness.ROOT, env=harness.environment(), capture_output=True, text=True, check=False, timeout=230,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "left or leaked: nothing" in result.stdout


COUNT = Count(
    descriptors=19, threads=4, processes=3, zombies=0, listening=0, shared_files=14, shared_bytes=60_000, sockets=7,
    memory=20_000_000,
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["descriptors", "threads", "processes", "zombies", "listening", "shared_files", "sockets"]
)
def test_what_grows_by_one_in_twenty_kills_is_a_leak(name: str) -> None:
    grown = [replace(COUNT, **{name: getattr(COUNT, name) + number // 20}) for number in range(100)]
    assert soak.leaks(grown, 100) == [f"{name}: {getattr(COUNT, name)} → {getattr(COUNT, name) + 4}"]


def test_what_comes_and_goes_is_none() -> None:
    coming = [
        replace(COUNT, descriptors=19 + number % 3, memory=20_000_000 + number) for number in range(100)
    ]
    assert soak.leaks(coming, 100) == []
    assert soak.leaks([*coming[:-10], *(replace(COUNT, memory=26_000_000) for _ in range(10))], 100)
