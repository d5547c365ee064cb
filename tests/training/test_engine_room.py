"""Where there is no room for a slot, that is an error like any other, and nothing else suffers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from supervisor.edge import memory
from supervisor.errors import StorageError
from supervisor.training.arena import Arena
from tests.training.test_engine import Engine, engine

__all__ = ["engine"]

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    place = tempfile.mkdtemp(dir="/dev/shm")
    yield Path(place)
    shutil.rmtree(place)


def test_a_full_tmpfs_costs_only_the_new_snapshot(tmp_path: Path) -> None:
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    command = [*namespace, sys.executable, "-W", "ignore", "-m", "tests.training.full_memory", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_memory_that_is_not_there_is_not_asked_for(
    engine: Engine, shared_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": torch.ones(1 << 18)}  # 1 MB
    monkeypatch.setattr(memory, "available", lambda: 2_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(StorageError, match="for each of 2 ranks are needed"):
        engine.write(shared_memory / "0", values)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    engine.write(shared_memory / "0", values)
    monkeypatch.setattr(memory, "available", lambda: 0)
    engine.write(shared_memory / "0", values)  # it has its pages


def test_what_other_ranks_have_already_is_not_asked_for_again(
    shared_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name in ("__1_1.distcp", ".metadata"):  # another kind of file
        (shared_memory / name).write_bytes(bytes(1 << 20))
    with pytest.raises(OSError, match="for each of 2 ranks are needed"):
        Arena(shared_memory / "__0_0.distcp", 1 << 20)
    (shared_memory / "__1_0.distcp").write_bytes(bytes(1 << 20))
    assert Arena(shared_memory / "__0_0.distcp", 1 << 20).is_in_place
