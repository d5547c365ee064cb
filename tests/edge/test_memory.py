"""How much memory there is by the limits of cgroups, of either version, and what the arenas need of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.edge import arenas, memory

MB = 1 << 20


def group(folder: Path, version: int, most: int | None, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        files = {"memory.max": "max" if most is None else most, "memory.current": used}
        files["memory.stat"] = f"anon 5\ninactive_file {cache}\n"
    else:
        files = {"memory.limit_in_bytes": most or (1 << 63) - 4096, "memory.usage_in_bytes": used}
        files["memory.stat"] = f"inactive_file 1\ntotal_inactive_file {cache}\n"
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_all_groups_around_us_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    own = next(
        line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if _is(line, version)
    )
    root = tmp_path / "memory" if version == 1 else tmp_path
    leaf = root / own.lstrip("/")
    assert memory.limit(os.getpid()) is None
    group(root, version, None, 0, 0)
    assert memory.limit(os.getpid()) is None
    group(root, version, 9 * MB, 5 * MB, MB)
    assert (memory.limit(os.getpid()), memory.available()) == (9 * MB, 5 * MB)
    if leaf != root:
        group(leaf, version, 8 * MB, 6 * MB, 0)
        assert (memory.limit(os.getpid()), memory.available()) == (8 * MB, 2 * MB)
    assert memory.limit(1 << 30) is None


def _is(line: str, version: int) -> bool:
    controllers = line.split(":", 2)[1]
    return controllers == "" if version == 2 else "memory" in controllers.split(",")


@pytest.fixture
def runtime() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(dir="/dev/shm"))
    for slot in range(3):
        (place / "slots" / str(slot)).mkdir(parents=True)
    yield place
    shutil.rmtree(place)


def test_what_the_arenas_need_and_hold(runtime: Path, tmp_path: Path) -> None:
    assert arenas.measure(runtime, os.getpid()) is None
    (runtime / "slots" / "0" / "a").write_bytes(bytes(3 * MB))
    (runtime / "slots" / "1" / "a").write_bytes(bytes(MB))
    (runtime / "slots" / "2").rmdir()
    (runtime / "slots" / "2").symlink_to(tmp_path)
    (tmp_path / "a").write_bytes(bytes(2 * MB))
    found = arenas.measure(runtime, None)
    assert found is not None
    assert (found.slot, found.needed, found.held, found.on_disk) == (3 * MB, 9 * MB, 4 * MB, 2 * MB)
    assert found.free > 0


def test_room_is_asked_for_only_what_is_missing(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = runtime / "slots" / "0"
    assert arenas.lacking(slot, 8 * MB) is None
    monkeypatch.setattr(memory, "available", lambda: 8 * MB)
    assert arenas.lacking(slot, 7 * MB) is None
    assert arenas.lacking(slot, 8 * MB) == (8 * MB, 7 * MB)
    (slot / "a").write_bytes(bytes(MB))
    assert arenas.lacking(slot, 8 * MB) is None
    assert arenas.lacking(tmp_path, 1 << 60) is None, "not in memory"
    assert arenas.lacking(slot, 1 << 60) is not None, "more than the file system has"
