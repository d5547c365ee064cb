"""One contract for every ``Files``, and what the wrappers add."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from supervisor.edge.files import LOCAL, Files, ThrottledFiles, WatchedFiles, free_bytes

EVERY_KIND = {
    "local": LOCAL,
    "watched": WatchedFiles(LOCAL, lambda operation, path: None),
    "throttled": ThrottledFiles(LOCAL, 1e12),
}
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL


@pytest.fixture(params=EVERY_KIND.values(), ids=EVERY_KIND.keys())
def files(request: pytest.FixtureRequest) -> Files:
    kind: Files = request.param
    return kind


def write(files: Files, path: Path, data: bytes) -> None:
    fd = files.open(path, CREATE)
    try:
        view = memoryview(data)
        while view:
            taken = files.write(fd, view)
            assert taken > 0
            view = view[taken:]
        files.sync(fd)
    finally:
        os.close(fd)


def test_what_is_written_is_read_in_pieces(files: Files, tmp_path: Path) -> None:
    write(files, tmp_path / "a", b"0123456789")
    fd = files.open(tmp_path / "a", os.O_RDONLY)
    buffer = memoryview(bytearray(4))
    found = b""
    while count := files.read(fd, buffer):
        found += bytes(buffer[:count])
    os.close(fd)
    assert found == b"0123456789"


def test_a_descriptor_is_not_inherited(files: Files, tmp_path: Path) -> None:
    fd = files.open(tmp_path / "a", CREATE)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_directory_can_be_synced(files: Files, tmp_path: Path) -> None:
    fd = files.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    files.sync(fd)
    os.close(fd)


def test_a_rename_takes_the_place_of_a_file(files: Files, tmp_path: Path) -> None:
    write(files, tmp_path / "a", b"new")
    write(files, tmp_path / "b", b"old")
    files.rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert not (tmp_path / "a").exists()


def test_remove_takes_files_links_and_empty_directories(files: Files, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("")
    (tmp_path / "l").symlink_to("d")
    for name in ("l", "f", "d"):
        files.remove(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_errors_are_the_kernels(files: Files, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("")
    with pytest.raises(FileNotFoundError):
        files.open(tmp_path / "none", os.O_RDONLY)
    with pytest.raises(FileExistsError):
        files.open(tmp_path / "d" / "f", CREATE)
    with pytest.raises(FileNotFoundError):
        files.rename(tmp_path / "none", tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        files.remove(tmp_path / "none")
    with pytest.raises(OSError) as caught:
        files.remove(tmp_path / "d")
    assert caught.value.errno == errno.ENOTEMPTY


def test_a_watcher_sees_each_operation_before_it_happens(tmp_path: Path) -> None:
    seen = []

    def before(operation: str, path: Path) -> None:
        seen.append((operation, path.name))
        if operation == "rename":
            raise OSError(errno.EIO, "scripted")

    files = WatchedFiles(LOCAL, before)
    write(files, tmp_path / "a", b"1")
    fd = files.open(tmp_path / "a", os.O_RDONLY)
    files.read(fd, memoryview(bytearray(1)))
    os.close(fd)
    with pytest.raises(OSError, match="scripted"):
        files.rename(tmp_path / "a", tmp_path / "b")
    files.remove(tmp_path / "a")
    assert seen == [
        ("open", "a"), ("write", "a"), ("sync", "a"), ("open", "a"), ("read", "a"), ("rename", "b"), ("remove", "a"),
    ]  # fmt: skip


class Clock:
    """Time that passes only in ``sleep``."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert 0 <= seconds <= 0.1 + 1e-9
        self.time += seconds


def test_the_limit_holds_for_all_writers_together(tmp_path: Path) -> None:
    clock = Clock()
    files = ThrottledFiles(LOCAL, 1000, now=clock.now, sleep=clock.sleep)
    write(files, tmp_path / "a", bytes(3000))
    write(files, tmp_path / "b", bytes(2000))
    assert clock.time - 100 == pytest.approx(5.0)


def test_time_without_writing_is_not_saved_up(tmp_path: Path) -> None:
    clock = Clock()
    files = ThrottledFiles(LOCAL, 1000, now=clock.now, sleep=clock.sleep)
    clock.time += 60
    write(files, tmp_path / "a", bytes(1000))
    assert clock.time - 160 == pytest.approx(1.0)


@pytest.mark.parametrize("bandwidth", [0, -1, float("nan")])
def test_a_limit_that_would_never_end_is_refused(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="not positive"):
        ThrottledFiles(LOCAL, bandwidth)


def test_free_bytes_are_those_of_the_file_system(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) > 0
