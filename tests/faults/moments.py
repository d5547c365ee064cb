"""Every moment at which a process can be killed, found by itself.

What SIGKILL leaves behind is what files hold then: the page cache outlives a process. So moments between which no file
changes are one. A recording run looks at the files before every line that this project (or torch's file writer) executes, on
every thread, and notes the lines before which they had changed. Then, for each of those lines, a fork of the same warm
process runs until there and kills itself.

Long copies into mapped files are one call, in which many bytes change: ``split_copies`` has them done in parts, with a
line between.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import select
import signal
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem

from supervisor.training import moves

ROOT = Path(__file__).parent.parent.parent
TRACED = tuple(str(path) for path in (ROOT / "supervisor", ROOT / "tests" / "faults", filesystem.__file__))
DEADLINE = 60.0
_OURS = ("content", "_checksum", "before")
_VECTOR = 16  # bytes of a ``struct iovec``


#: a line of a file, and the how manieth time that it is executed
Moment = tuple[str, int, int]


def trace(before: Callable[[Moment], None]) -> None:
    """Call ``before`` ahead of every line, on all threads of this process from now on, and not in its forks.

    A fork has lines to go before it can say ``stop_tracing``, and what it finds changed was done by its parent.
    """
    home = os.getpid()
    times: Counter[tuple[str, int]] = Counter()
    wanted: dict[Any, bool] = {}

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and os.getpid() == home:
            line = frame.f_code.co_filename, frame.f_lineno
            times[line] += 1
            before((*line, times[line]))
        return local

    def at_call(frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code not in wanted:
            wanted[code] = code.co_filename.startswith(TRACED) and code.co_name not in _OURS
        return local if wanted[code] else None

    threading.settrace(at_call)
    sys.settrace(at_call)


def stop_tracing() -> None:
    """On this thread, and on those to come."""
    threading.settrace(None)  # type: ignore[arg-type]
    sys.settrace(None)


def split_copies() -> None:
    """Have this process copy tensors into the arena in parts, with a line of Python between them.

    Every other row of small tensors is cut short, as the kernel may.
    """
    move: Any = ctypes.memmove
    foreach = torch._foreach_copy_
    put: Any = moves._pwritev
    rows = itertools.count()

    def in_halves(to: int, at: int, size: int) -> None:
        half = size // 2
        move(to, at, half)
        move(to + half, at + half, size - half)

    def one_by_one(places: list[torch.Tensor], views: list[torch.Tensor]) -> None:
        for place, view in zip(places, views, strict=True):
            foreach([place], [view])

    def in_two(fd: int, address: int, count: int, offset: int) -> int:
        half = count // 2
        written: int = put(fd, address, half, offset)
        if next(rows) % 2:
            return written
        rest: int = put(fd, address + half * _VECTOR, count - half, offset + written)
        return written + rest

    moves.SMALL = 1024  # type: ignore[misc]  # bytes, for tensors that are small here
    ctypes.memmove = in_halves  # type: ignore[assignment]
    torch._foreach_copy_ = one_by_one  # type: ignore[assignment]
    moves._pwritev = in_two


def content(root: Path) -> dict[str, int | str]:
    """What files hold: a checksum of each, by its path."""
    found: dict[str, int | str] = {}
    folders = [str(root)]
    for folder in folders:
        found[folder] = ""
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    found[entry.path] = os.readlink(entry.path)
                elif entry.is_dir():
                    folders.append(entry.path)
                elif entry.is_file():
                    found[entry.path] = _checksum(entry.path)
    return found


def _checksum(path: str) -> int:
    file = os.open(path, os.O_RDONLY)
    try:
        return zlib.crc32(os.read(file, 1 << 24))
    finally:
        os.close(file)


def moments(work: Callable[[], None], root: Path) -> list[Moment]:
    """The lines of ``work``, carried out in a fork, before which something below ``root`` had changed."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as told:
        child = os.fork()
        if child == 0:
            try:
                _record(work, root, writing)
            finally:
                os._exit(3)
        os.close(writing)
        found = [tuple(json.loads(line)) for line in told]
    _, status = os.waitpid(child, 0)
    assert status == 0, "the undisturbed run failed"
    return found


def _record(work: Callable[[], None], root: Path, told: int) -> None:
    looking = threading.Lock()
    last = [content(root)]

    def before(moment: Moment) -> None:
        with looking:
            if (now := content(root)) != last[0]:
                last[0] = now
                os.write(told, json.dumps(moment).encode() + b"\n")

    trace(before)
    work()
    stop_tracing()
    os._exit(0)


def killed(work: Callable[[], None], moment: Moment) -> int:
    """Carry out ``work`` in a fork that kills itself at ``moment``; the negative signal, or 0 if it got through."""

    def before(now: Moment) -> None:
        if now == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            trace(before)
            work()
            stop_tracing()
            os._exit(0)
        finally:
            os._exit(3)
    return ended(child)


def ended(child: int) -> int:
    """The exit code of a child; it is killed when it does not come to an end."""
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], DEADLINE)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
