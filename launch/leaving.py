"""The end of a worker that fails: what of it somebody needs, and when that is done.

After an exception (or ``sys.exit`` with another code than 0) the interpreter calls ``sys.excepthook``, waits for threads that are
no daemons, runs the exit handlers, and flushes standard output. All of that is the script's own, and is waited for. Then it takes
its modules apart, and with them torch, gloo and CUDA: seconds of work that nobody sees, in a process that is going to be killed. So
the last exit handler says that everything of the script's is done, and the supervisor need not wait for the rest.

What taking the modules apart does for a script beside that is to close the files that it left open. That is done here too: what
is in their buffers is written, and files with an end of their own (gzip's) are closed. What is left out: ``__del__`` of other
objects, and exit handlers of C libraries.

"The last handler" is the first that was registered, since they run in reverse. Where something was registered before us
(by ``sitecustomize``, by a ``.pth`` file), nothing is said, and the supervisor waits for the end of the process.
"""

from __future__ import annotations

import _io
import atexit
import contextlib
import ctypes
import fcntl
import gc
import os
import stat
import sys
from typing import Any, Final

from launch.warmup import Gate
from supervisor.edge.link import Link

_BUFFERED: Final = frozenset({_io.BufferedWriter, _io.BufferedRandom, _io.BufferedRWPair})
_NOTHING_TO_WRITE: Final = frozenset({_io.BufferedReader, _io.FileIO, _io.BytesIO, _io.StringIO})


class Leaving:
    """Made before anything of the script's runs, so that its handler comes after all of the script's."""

    def __init__(self, link: Link, gate: Gate) -> None:
        self._link, self._gate = link, gate
        self._worker = os.getpid()
        self._is_last = not atexit._ncallbacks()
        self._code = 0
        atexit.register(self._at_exit)

    @property
    def is_ours(self) -> bool:
        """Whether this is the worker itself, and no fork of it that has come to its end."""
        return os.getpid() == self._worker

    def says(self, code: int) -> None:
        """The script is over and is going to exit with this code."""
        self._gate.ends_here()
        self._code = code
        self._link.tell("exiting", code=code)

    def _at_exit(self) -> None:
        if self._code and self._is_last and self.is_ours:
            _write_out(str(self._link.runtime))
            self._link.tell("left")


def _write_out(runtime: str) -> None:
    """Empty every buffer on its way to a file. Whatever cannot be written would not have been without us."""
    for stream in (sys.stdout, sys.stderr):
        _quietly(stream.flush)
    if _writes_elsewhere(runtime):  # to look for the objects takes 20 ms
        text, own, binary = _open_files()
        for file in text:
            _quietly(file.flush)
        for file in own:
            _quietly(file.close)
        for file in binary:
            _quietly(file.flush)
    ctypes.CDLL(None).fflush(None)


def _writes_elsewhere(runtime: str) -> bool:
    """Whether a descriptor is open for writing to a file or a pipe, beside standard output and what is ours."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            fd = int(name)
            kind = stat.S_IFMT(os.fstat(fd).st_mode)
            is_ours = fd <= 2 or os.readlink(f"/proc/self/fd/{name}").startswith(runtime + os.sep)
            writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
            if writes and kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFBLK) and not is_ours:
                return True
    return False


def _quietly(action: Any) -> None:
    with contextlib.suppress(Exception):
        action()


def _open_files() -> tuple[list[Any], list[Any], list[Any]]:
    """Text files, files of classes written in Python, and buffered files: the order in which one lies upon another.

    Told by their types, because to ask an object for its class may run code of the script's.
    """
    things = gc.get_objects()
    types = list(map(type, things))
    kinds = {kind for kind in set(types) if _io._IOBase in kind.__mro__} - _NOTHING_TO_WRITE
    files = [(thing, kind) for thing, kind in zip(things, types, strict=True) if kind in kinds]
    text = [file for file, kind in files if kind is _io.TextIOWrapper]
    binary = [file for file, kind in files if kind in _BUFFERED]
    own = [file for file, kind in files if kind is not _io.TextIOWrapper and kind not in _BUFFERED]
    return text, own, binary
