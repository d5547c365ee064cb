"""Faults that a worker inflicts on itself when ``everstep rehearse`` asks for them, by a word on its control page.

The page lies in a directory that only the job's own user can enter, so nobody else can ask. Its background thread looks (``vital.py``); the user's code takes no
part. The page says when the fault struck, just before it does.

- An exception is raised asynchronously, out of whatever Python code the main thread runs next: a main thread inside of a
  collective raises when that returns.
- The interpreter's lock is held by a C function that waits for a lock on the page's file, which whoever asks holds: it
  returns when the rehearsal lets go, or dies.

Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
import time

from supervisor.edge.control import ControlPage, Fault, Word


class RehearsedError(Exception):
    """Raised on purpose. Each says when, so that no two are taken for one that would always happen again."""

    def __init__(self) -> None:
        super().__init__(f"raised on purpose by `everstep rehearse`, at {time.time():.3f}")


def strike(page: ControlPage, main: int) -> None:
    """Do what the page asks for, to the main thread (identity ``main``) or to the whole process."""
    asked = page[Word.FAULT]
    page[Word.STRUCK_NS] = time.monotonic_ns()
    page[Word.FAULT] = 0
    if asked == Fault.STICK:
        _stick(page)
    elif asked in (Fault.RAISE, Fault.OUT_OF_MEMORY):
        kind = RehearsedError if asked == Fault.RAISE else _out_of_memory()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(kind))


def _out_of_memory() -> type[BaseException]:
    torch = sys.modules.get("torch")
    base: type[BaseException] = getattr(torch, "OutOfMemoryError", MemoryError)
    return type("RehearsedOutOfMemoryError", (RehearsedError, base), {"__module__": __name__})


def _stick(page: ControlPage) -> None:
    try:
        fd = os.open(page.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # the attempt is over
    try:
        ctypes.PyDLL(None).flock(fd, fcntl.LOCK_EX)  # PyDLL: the lock of the interpreter is kept meanwhile
    finally:
        os.close(fd)
