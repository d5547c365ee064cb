"""File operations: the ones that can fail, stall or be cut short by a crash while a checkpoint is written.

``Files`` is the whole list, so a test that scripts them scripts every moment at which a drain can die. Errors are
the plain ``OSError``; what they mean is the caller's to say. ``close`` and ``mkdir`` are not on it: nothing rests on
the first (files are synced before), and a crash in the second is one before the next operation.
"""

# ruff: noqa: D102 - the methods are explained by the protocol

from __future__ import annotations

import ctypes
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from supervisor.edge import clock

Buffer = bytes | memoryview


class Files(Protocol):
    """The operations, as the kernel offers them: reads and writes may be short. Safe for several threads."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor, closed by the caller with ``os.close``; created files have mode 0644 less the umask."""
        ...

    def read(self, fd: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from the file's position; the bytes read, 0 at its end."""
        ...

    def write(self, fd: int, data: Buffer) -> int:
        """Write at the file's position; the bytes taken, at least one."""
        ...

    def sync(self, fd: int) -> None:
        """Return when the file (or the directory's entries) are on storage."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Atomically put ``source`` in the place of ``target``, which may exist if it is no directory."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file, a symbolic link or an empty directory."""
        ...


def _writeback() -> Callable[[int], object]:
    """Have the kernel begin to write what is dirty of a file, without waiting and without taking note of errors.

    Storage then works while we copy and hash, and the sync at the end, which does report errors, has little left to do.
    """
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # not glibc's
        return lambda _fd: None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return lambda fd: call(fd, 0, 0, 2)  # the whole file, SYNC_FILE_RANGE_WRITE


_begin_writeback: Final = _writeback()
_PIECE: Final = 8 << 20  # bytes between two such requests


class LocalFiles:
    """The file systems the kernel has mounted."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def read(self, fd: int, buffer: memoryview) -> int:
        return os.readv(fd, [buffer])

    def write(self, fd: int, data: Buffer) -> int:
        before = os.lseek(fd, 0, os.SEEK_CUR)
        count = os.write(fd, data)
        if before // _PIECE != (before + count) // _PIECE:
            _begin_writeback(fd)
        return count

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.rmdir(path)
        else:
            os.unlink(path)


LOCAL: Final = LocalFiles()


class WatchedFiles:
    """Calls ``before(name of the operation, path)`` ahead of each: it may raise, kill the process, fill the disk."""

    def __init__(self, files: Files, before: Callable[[str, Path], None]) -> None:
        self._files = files
        self._before = before

    def open(self, path: Path, flags: int) -> int:
        self._before("open", path)
        return self._files.open(path, flags)

    def read(self, fd: int, buffer: memoryview) -> int:
        self._before("read", _path_of(fd))
        return self._files.read(fd, buffer)

    def write(self, fd: int, data: Buffer) -> int:
        self._before("write", _path_of(fd))
        return self._files.write(fd, data)

    def sync(self, fd: int) -> None:
        self._before("sync", _path_of(fd))
        self._files.sync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename", target)
        self._files.rename(source, target)

    def remove(self, path: Path) -> None:
        self._before("remove", path)
        self._files.remove(path)


class Pace:
    """At most ``bandwidth`` bytes a second, all threads together."""

    def __init__(self, bandwidth: float, *, now: Callable[[], float] = clock.monotonic) -> None:
        if not bandwidth > 0:
            raise ValueError(f"a bandwidth of {bandwidth!r} bytes a second is not positive")
        self._bandwidth = bandwidth
        self._now = now
        #: the bytes of a tenth of a second: as many may go at once
        self.piece = max(1, int(bandwidth / 10))
        self._lock = threading.Lock()
        self._free_at = now()  # when all that was written so far is paid for

    def spend(self, count: int) -> float:
        """``count`` bytes go; the seconds to wait until they are paid for."""
        with self._lock:
            now = self._now()
            self._free_at = max(self._free_at, now) + count / self._bandwidth
            return self._free_at - now


class ThrottledFiles(WatchedFiles):
    """Writes at most ``bandwidth`` bytes a second, all threads together, in pieces of a tenth of a second."""

    def __init__(
        self,
        files: Files,
        bandwidth: float,
        *,
        now: Callable[[], float] = clock.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(files, _nothing)
        self._pace = Pace(bandwidth, now=now)
        self._sleep = sleep

    def write(self, fd: int, data: Buffer) -> int:
        written = self._files.write(fd, memoryview(data)[: self._pace.piece])
        self._sleep(self._pace.spend(written))
        return written


def leads_inside(name: str) -> bool:
    """Whether a name is a plain relative path, with nothing in it that leads elsewhere or that a terminal would not show."""
    return (
        all(part not in ("", ".", "..") for part in name.split("/"))
        and "\\" not in name
        and not any(ord(character) < 32 or ord(character) == 127 for character in name)
    )


def link(source: Path, target: Path) -> bool:
    """Give a file another name; False where that cannot be done."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        return False
    return True


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write on the file system of ``path``; without end where that does not say (some in FUSE)."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize


def _nothing(_operation: str, _path: Path) -> None:
    """The hook of a wrapper that only forwards."""


def _path_of(fd: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{fd}"))
