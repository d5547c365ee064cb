"""EIO and short writes at every file operation of a drain and of the arena: retried or refused, and never damage."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from supervisor.checkpoint.catalog import list_checkpoints, step_directory, sweep, verify
from supervisor.checkpoint.commit import drain
from supervisor.edge.files import LOCAL, Buffer, LocalFiles, WatchedFiles
from supervisor.errors import StorageError
from tests.checkpoint.tools import at_once, origin, write_source
from tests.training.harness import launch

OLD, NEW = 100, 200


class Failing:
    """``count`` operations fail with EIO, from the one numbered ``first`` on."""

    def __init__(self, first: int, count: float) -> None:
        self.seen = 0
        self._first, self._count = first, count
        self.files = WatchedFiles(LOCAL, self._before)

    def _before(self, operation: str, path: Path) -> None:
        self.seen += 1
        if self._first < self.seen <= self._first + self._count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class Sparing(LocalFiles):
    """Takes no more than ``most`` bytes of any write, and gives no more at any read."""

    def __init__(self, most: int) -> None:
        self._most = most

    def write(self, fd: int, data: Buffer) -> int:
        return super().write(fd, memoryview(data)[: self._most])

    def read(self, fd: int, buffer: memoryview) -> int:
        return super().read(fd, buffer[: self._most])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "slot", seed=1)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    drain(write_source(tmp_path / "old"), step_directory(tmp_path / "checkpoints", OLD), origin(OLD))
    return tmp_path / "checkpoints"


def listed(checkpoints: Path) -> list[int]:
    """Steps that are listed as good: they must be, and once it was swept nothing else may be there."""
    records = list_checkpoints(checkpoints)
    assert [verify(record) for record in records] == [[]] * len(records)
    sweep(checkpoints)
    assert len(list(checkpoints.iterdir())) == len(records)
    return [record.step for record in records]


@pytest.mark.parametrize("count", [1, 3, float("inf")], ids=["once", "thrice", "for good"])
def test_eio_from_any_operation_on(count: float, source: Path, checkpoints: Path) -> None:
    target = step_directory(checkpoints, NEW)
    refused = committed = 0
    for first in range(1000):
        failing = Failing(first, count)
        try:
            drain(source, target, origin(NEW), files=failing.files, threads=1, retries=at_once())
        except StorageError:
            refused += 1
            assert listed(checkpoints) in ([OLD], [NEW, OLD])
        else:
            committed += 1
            assert listed(checkpoints) == [NEW, OLD]
        shutil.rmtree(target, ignore_errors=True)
        if failing.seen <= first:
            break
    assert refused + committed > 20
    assert refused > 20 if count == float("inf") else committed > 15, "what passes is tried again"


@pytest.mark.parametrize("most", [1, 2, 61, 4095])
def test_short_reads_and_writes(most: int, source: Path, checkpoints: Path) -> None:
    drain(source, step_directory(checkpoints, NEW), origin(NEW), files=Sparing(most))
    assert listed(checkpoints) == [NEW, OLD]


def until_full(root: Path) -> list[int]:
    """Drains into files that may not grow beyond a size; which sizes sufficed."""
    source, checkpoints = root / "slot", root / "checkpoints"
    sizes = []
    for size in range(0, 4000, 97):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            drain(source, step_directory(checkpoints, NEW), origin(NEW))
        except StorageError:
            assert os.listdir(checkpoints) == [f"step-{OLD:09d}"]
        else:
            sizes.append(size)
            shutil.rmtree(step_directory(checkpoints, NEW))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert listed(checkpoints) == [OLD]
    return sizes


def test_the_kernel_cuts_a_write_short_anywhere(source: Path, checkpoints: Path, tmp_path: Path) -> None:
    [sizes] = launch(until_full, 1, tmp_path)
    largest = max(path.stat().st_size for path in source.iterdir())
    assert sizes == [size for size in range(0, 4000, 97) if size >= largest]


def fail_snapshots(root: Path) -> dict[str, Any]:
    """Have every call in turn fail that a node makes to change a file, once; the node goes on, or its run ends in order."""
    from tests.faults import node

    expected = node.reference()
    armed: list[int | None] = [None]
    seen = [0]

    def arrive(path: object) -> None:
        if armed[0] is None or not str(path).startswith(str(root)):
            return
        seen[0] += 1
        if seen[0] == armed[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            arrive(arguments[0] if writes else None)
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            arrive(arguments[0] if isinstance(arguments[0], (str, os.PathLike)) else None)

    sys.addaudithook(audit)
    for name in ("ftruncate", "posix_fallocate", "write", "fsync"):
        setattr(os, name, _arriving(getattr(os, name), arrive))
    ended = failures = 0
    for number in range(1, 10_000):
        seen[0], armed[0] = 0, number
        place = root / str(number)
        told = [0]
        try:
            supervisor = node.Supervisor(place, 0, lambda step, told=told: told.__setitem__(0, step))
            assert node.work(supervisor, supervisor.runtime).digest() == expected[node.STEPS]
            failures += bool(supervisor.failures)
        except (OSError, StorageError):  # the supervisor's own: its run is over
            ended += 1
        armed[0] = None
        node.check(place, expected, told[0])
        shutil.rmtree(place)
        if seen[0] < number:
            return {"calls": number - 1, "ended": ended, "failures": failures}
    raise AssertionError("it never ends")


def _arriving(function: Any, arrive: Any) -> Any:
    def call(fd: int, *arguments: Any) -> Any:
        arrive(os.readlink(f"/proc/self/fd/{fd}"))
        return function(fd, *arguments)

    return call


def test_eio_at_any_call_of_a_node(tmp_path: Path) -> None:
    [result] = launch(fail_snapshots, 1, tmp_path)
    print(result)
    assert result["calls"] > 60
    assert result["failures"] > 20
