"""A child process of a worker that outlives signals sent to the whole process tree. Loaded by its path in spawned children.

While a Session is open, SLURM's SIGTERM to every process must not kill the data loader's workers: torch would raise
in the training loop before the agreed save. But the worker's own ``terminate()`` must end them. Who sent a signal is told
to C handlers only, and torch puts such a handler of its own into its loader workers, which dies of strangers' SIGTERM.
So the signals are *blocked* in all threads of the child, whatever handlers there are or will be, and one thread takes
them with ``sigwaitinfo``, which says who sent each:

- the parent (or the process itself): the very same signal, sender and all, is delivered after all, on this thread, where it
  meets the handler that stands: the default action, torch's, or the child's own;
- anybody else: it is dropped while the Session is open, and delivered otherwise.

A Python handler runs on the main thread, which may be inside a system call that the signal was to interrupt: so another
signal, whose handler does nothing, interrupts it there; more than once, because one that comes just before the thread enters
the call is lost on it. What the child executes with ``subprocess`` starts with the
mask that there was without us (a mask goes through an exec, other than handlers). Limits: a signal that a thread sends to itself
(``raise_signal``) stays blocked; the parent's signal is lost when a stranger's of the same number came just before it and was
not taken yet (the kernel keeps one of a kind); and a child that never lets go of the GIL can only be killed.

Standard library only.
"""

from __future__ import annotations

import _posixsubprocess
import _thread
import ctypes
import mmap
import os
import platform
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable

#: signals that a cluster, a terminal or an operator may send to every process of a job
SHIELDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_libc = ctypes.CDLL(None, use_errno=True)
_SIGINFO_BYTES = 128
#: rt_tgsigqueueinfo(2) has no wrapper in the C library
_QUEUE_TO_THREAD = {"x86_64": 297, "ppc64le": 322, "s390x": 330}.get(platform.machine(), 240)

#: gaps between one interruption of the main thread and the next, in seconds
_AGAIN = tuple(0.001 * 2**n for n in range(11))

#: signals that are blocked because of us, and were not before
added: frozenset[signal.Signals] = frozenset()


def attach(is_open: Callable[[], bool], parent: int | None, before: Iterable[int]) -> None:
    """Shield this process. ``is_open``: whether strangers' signals are to be dropped now.

    ``parent``: who may signal beside the parent process (a fork server's child is started on behalf of another).
    ``before``: the signals that were blocked already, and are to be in what this process executes.
    """
    global added
    signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    added = added | (frozenset(SHIELDED) - frozenset(signal.Signals(number) for number in before))
    interrupt = _interrupter(threading.get_ident())

    def take(info: signal.struct_siginfo) -> bool:
        if info.si_pid not in (os.getppid(), os.getpid(), parent) and is_open():
            return False
        _deliver(info)
        interrupt()
        return True

    try:
        _thread.start_new_thread(_watch, (take, interrupt))
    except RuntimeError:  # no more threads: better unshielded than never to be ended
        signal.pthread_sigmask(signal.SIG_UNBLOCK, added)
        added = frozenset()
    else:
        _execute_unblocked(take)


def attach_spawned(
    page: str, offset: int, flags: tuple[int, int], parent: int, before: Iterable[int]
) -> None:
    """Shield a process that was executed anew: ``flags`` (open, closed) stand in the word at ``offset`` of ``page``."""
    fd = os.open(page, os.O_RDONLY | os.O_CLOEXEC)
    words = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)

    def is_open() -> bool:
        (word,) = struct.unpack_from("Q", words, offset)
        return bool(word & flags[0]) and not word & flags[1]

    attach(is_open, parent, before)


def _watch(take: Callable[[signal.struct_siginfo], bool], interrupt: Callable[[], None]) -> None:
    again: list[float] = []
    while True:
        info = signal.sigtimedwait(SHIELDED, again.pop(0)) if again else signal.sigwaitinfo(SHIELDED)
        if info is None:
            interrupt()
        elif take(info):
            again = list(_AGAIN)


def _deliver(info: signal.struct_siginfo) -> None:
    """The same signal once more, to this thread: only here it is not blocked. It may be the end."""
    raw = ctypes.create_string_buffer(_SIGINFO_BYTES)
    struct.pack_into("iii4xii", raw, 0, info.si_signo, info.si_errno, info.si_code, info.si_pid, info.si_uid)
    here = (ctypes.c_long(os.getpid()), ctypes.c_long(threading.get_native_id()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {info.si_signo})
    # a process may name any sender of a signal to itself
    if _libc.syscall(ctypes.c_long(_QUEUE_TO_THREAD), *here, ctypes.c_long(info.si_signo), raw):
        signal.pthread_kill(threading.get_ident(), info.si_signo)
    signal.pthread_sigmask(signal.SIG_BLOCK, {info.si_signo})


def _interrupter(main: int) -> Callable[[], None]:
    """What ends a system call of the thread ``main``: a signal whose handler does nothing.

    A handler must be a C function; ``getpid`` is one that nobody minds.
    """
    number = signal.SIGRTMAX - 1
    if signal.getsignal(number) is not signal.SIG_DFL:
        return lambda: None  # somebody uses it
    _libc.signal.argtypes, _libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    _libc.signal(number, ctypes.cast(_libc.getpid, ctypes.c_void_p))
    _libc.siginterrupt(number, 1)
    return lambda: signal.pthread_kill(main, number)


def _execute_unblocked(take: Callable[[signal.struct_siginfo], bool]) -> None:
    """Have ``subprocess`` start programs with the mask of before.

    The calling thread is open for some microseconds only (a stranger's signal in them does its worst): what is pending is taken
    first, and ``fork_exec`` itself blocks everything while it is at work. A ``preexec_fn`` would leave no gap, but costs
    a real fork, a copy of all page tables, for every program.
    """
    # over a fork an older one is inherited
    fork_exec = getattr(_posixsubprocess.fork_exec, "everstep", _posixsubprocess.fork_exec)

    def unblocked(*arguments: object) -> int:
        while (info := signal.sigtimedwait(SHIELDED, 0)) is not None:
            take(info)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, added)
        try:
            return fork_exec(*arguments)  # type: ignore[arg-type]
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, added)

    unblocked.everstep = fork_exec  # type: ignore[attr-defined]
    subprocess = sys.modules.get("subprocess")
    if getattr(subprocess, "_fork_exec", None) is _posixsubprocess.fork_exec:
        subprocess._fork_exec = unblocked  # type: ignore[union-attr]
    _posixsubprocess.fork_exec = unblocked
