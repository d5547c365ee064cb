"""Processes that somebody else started, hit for certain: never another one that has got the same pid since.

A pidfd is opened first and the process examined after. What was examined is what the pidfd means if it is still alive then:
a pid is not given to another process before its owner has been collected.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from supervisor.edge import kernel


class Target:
    """A process, held by its pidfd."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self._fd = fd

    def send(self, signum: signal.Signals) -> None:
        """Signal it. Raises ProcessLookupError when it has ended."""
        kernel.pidfd_send_signal(self._fd, signum)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        return not select.select([self._fd], [], [], 0)[0]


@contextlib.contextmanager
def held(pid: int, proof: Callable[[int], bool]) -> Iterator[Target]:
    """The process ``pid``, if ``proof`` says that it is the one meant.

    Raises ProcessLookupError when it is not, or is gone; PermissionError when it is another user's.
    """
    fd = kernel.pidfd_open(pid)
    try:
        target = Target(pid, fd)
        if not proof(pid) or not target.is_alive:
            raise ProcessLookupError(f"pid {pid} is another process by now")
        yield target
    finally:
        os.close(fd)


def has_open(pid: int, path: Path) -> bool:
    """Whether the process has the file open."""
    try:
        wanted = os.stat(path)
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for number in numbers:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), wanted):
                return True
    return False


def parent_of(pid: int) -> int:
    """The pid of its parent; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return 0
    return int(fields[1])
