"""Waiting for a word of shared memory to change, and waking who waits: the kernel's futex, between processes.

A wake is also a full memory barrier: whoever sees what was written after it sees all that was written before it.

Source: futex(2).
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any, Final

#: number of the system call; on other machines there is none
_NUMBERS: Final = {
    "x86_64": 202,
    "aarch64": 98,
    "riscv64": 98,
    "loongarch64": 98,
    "ppc64le": 221,
    "s390x": 238,
}
_WAIT: Final = 0
_WAKE: Final = 1
_ALL: Final = (1 << 31) - 1

_NUMBER: Final = _NUMBERS.get(platform.machine(), 0)
IS_AVAILABLE: Final = _NUMBER != 0

_wait = ctypes.CDLL(None).syscall  # without the interpreter's lock
_wake = ctypes.PyDLL(None).syscall  # keeps it: giving it away may cost milliseconds
for _call in (_wait, _wake):
    _call.restype = ctypes.c_long
    _call.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def timeout(seconds: float) -> Any:
    """For ``wait``; can be used again."""
    return ctypes.byref(_Timespec(int(seconds), int(seconds % 1 * 1e9)))


def wait(address: int, seen: int, limit: Any) -> None:
    """Sleep while the 32-bit word at ``address`` is ``seen``: until a wake, a signal or ``limit``, or for no reason at all."""
    _wait(_NUMBER, address, _WAIT, seen, limit)


def wake(address: int) -> None:
    """Wake all who wait at ``address``."""
    _wake(_NUMBER, address, _WAKE, _ALL, None)
