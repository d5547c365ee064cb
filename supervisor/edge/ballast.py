"""A file system made full, and never for longer than this process lives: the file that fills it has no name.

So it goes with its descriptor, whatever ends us.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from supervisor.edge import memory
from supervisor.edge.files import free_bytes

_IN_MEMORY = ("tmpfs", "ramfs")


@contextlib.contextmanager
def filled(folder: Path, leave: int) -> Iterator[int]:
    """Leave only ``leave`` bytes free on the file system of ``folder``; yields the bytes taken. Raises OSError."""
    fd = _nameless(folder)
    try:
        taken = max(0, free_bytes(folder) - leave)
        if taken:
            os.posix_fallocate(fd, 0, taken)
        yield taken
    finally:
        os.close(fd)


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # a file system without such files (NFS)
        fd, name = tempfile.mkstemp(prefix=".everstep-ballast-", dir=folder)
        os.unlink(name)
        return fd


def used_by_others(folder: Path) -> list[Path]:
    """Places known to matter to other programs that lie on the file system of ``folder``."""
    device = os.stat(folder).st_dev
    found = []
    for place in (Path("/"), Path("/var"), Path(tempfile.gettempdir()), Path("~").expanduser()):
        with contextlib.suppress(OSError):
            if os.stat(place).st_dev == device:
                found.append(place)
    return found


def would_take_memory(folder: Path, size: int) -> bool:
    """Whether ``size`` bytes there would be more than half of the memory that is left."""
    available = memory.available()
    return _kind_of(folder) in _IN_MEMORY and available is not None and size > available / 2


def _kind_of(folder: Path) -> str:
    """``tmpfs``, ``ext4``, …; empty when nobody knows."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""
