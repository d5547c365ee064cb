"""A file system made full, and never for longer than this process lives: the file that fills it has no name.

So it goes with its descriptor, whatever ends us. Others go on writing and removing there: what they give back (the
checkpoint before the newest one, say) is taken too, a moment later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from supervisor.edge import memory, mounts
from supervisor.edge.files import free_bytes

_LOOK = 0.02  # seconds between two looks at what is free
_LEAST = 4096  # bytes that are worth taking


@contextlib.contextmanager
def filled(folder: Path, leave: int) -> Iterator[None]:
    """Leave only ``leave`` bytes free on the file system of ``folder``, and keep it so. Raises OSError."""
    fd = _nameless(folder)
    over = threading.Event()
    try:
        taken = _take(fd, 0, folder, leave)
        keeper = threading.Thread(target=_keep, args=(fd, taken, folder, leave, over), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
    finally:
        os.close(fd)


def _keep(fd: int, taken: int, folder: Path, leave: int, over: threading.Event) -> None:
    while not over.wait(_LOOK):
        try:
            taken = _take(fd, taken, folder, leave)
        except OSError:
            return  # gone, or read-only by now: nothing can be written there anyway


def _take(fd: int, taken: int, folder: Path, leave: int) -> int:
    """Make the file longer until only ``leave`` bytes are free; returns its new length, ``taken`` being the present one."""
    most = free_bytes(folder)
    while (more := min(free_bytes(folder) - leave, most)) >= _LEAST:
        try:
            os.posix_fallocate(fd, taken, more)
            taken += more
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            most = more // 2  # somebody was faster, or not all that is free is for us
    return taken


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
    return mounts.is_in_memory(folder) and available is not None and size > available / 2
