"""System calls that Python offers only where it was built against new enough headers; some builds for old systems are not.

What Python lacks is called by number. A kernel that lacks it too says ENOSYS, as an OSError.

Source: pidfd_open(2), pidfd_send_signal(2), memfd_create(2); the numbers from the kernel's ``syscall.tbl``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
from typing import Final

_PIDFD_SEND_SIGNAL: Final = 424  # alike on all machines, as all that came later
_PIDFD_OPEN: Final = 434
_MEMFD_CREATE: Final = {
    "x86_64": 319,
    "aarch64": 279,
    "riscv64": 279,
    "loongarch64": 279,
    "ppc64le": 360,
    "s390x": 350,
}
_CLOEXEC: Final = 1

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def pidfd_open(pid: int) -> int:
    """A descriptor of the process, readable once it has ended; closed on exec. Raises OSError."""
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    return _called(_PIDFD_OPEN, ctypes.c_long(pid), ctypes.c_long(0))


def pidfd_send_signal(pidfd: int, signum: int) -> None:
    """Raises OSError."""
    if hasattr(signal, "pidfd_send_signal"):
        signal.pidfd_send_signal(pidfd, signum)
    else:
        _called(
            _PIDFD_SEND_SIGNAL,
            ctypes.c_long(pidfd),
            ctypes.c_long(signum),
            ctypes.c_void_p(),
            ctypes.c_long(0),
        )


def memfd(name: str) -> int:
    """A descriptor of an empty file in memory that has no place in any directory; closed on exec. Raises OSError."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    number = _MEMFD_CREATE.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return _called(number, ctypes.c_char_p(name.encode()), ctypes.c_long(_CLOEXEC))


def _called(number: int, *arguments: ctypes.c_long | ctypes.c_char_p | ctypes.c_void_p) -> int:
    outcome = int(_syscall(ctypes.c_long(number), *arguments))
    if outcome < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return outcome
