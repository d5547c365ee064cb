"""The signs of life of a worker: a background thread that beats, and stacks on request.

The *beat* (four a second) needs the interpreter's lock, so it stops when some code holds that for ever, and it tells that
apart from a main thread that is stuck. At each beat the thread looks where the main thread is:

- at another place than last time, in any frame of its stack, or taken off in the middle of Python code, at a jump back or a
  function's start, where the interpreter gives its lock away: it *moves*. Inside of C code, a collective or a sleep, it is at a
  call. So it is in a long operation of torch: without a GPU, CPU time shows that it is at work (waits for a GPU take CPU time too).
- at a place where one waits for other ranks: what is left is the rank's *own share* of the time. Of ranks that march in step
  the slow one waits least.

It is a thread that ``threading`` does not know, and that a fork leaves behind. It starts when torch has been imported: a program
without torch is not watched like this.

*Stacks* are written by ``faulthandler``'s handler in C, which needs no lock and works while the main thread is inside of C code,
to a file in the runtime directory, so that storage that hangs does not keep it from writing. The signal is one that nobody
uses: if the script puts a handler of its own there, that stays, and no stacks are asked for. When the process crashes (SIGSEGV and the like)
the same file gets the stacks, unless the script has its own ``faulthandler`` enabled.

Standard library only.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import faulthandler
import mmap
import opcode
import os
import signal
import struct
import sys
import time
from types import CodeType, FrameType
from typing import Final

from launch import fault
from supervisor.decide import stacks
from supervisor.edge.control import ControlPage, Phase, Word
from supervisor.edge.link import Link, stacks_path

PERIOD: Final = 0.25  # seconds
#: two below the last real-time signal: ``launch/shield.py`` has the one between
SIGNAL: Final = signal.SIGRTMAX - 2
_DEEPEST: Final = 64  # frames that are looked at
#: where the interpreter's lock is given to whoever asks for it, without a call
_RUNNING: Final = frozenset(
    number for name, number in opcode.opmap.items() if name == "RESUME" or "JUMP_BACKWARD" in name
)
_AT_WORK: Final = 0.2  # of a CPU
_ACCELERATORS: Final = ("cuda", "xpu", "mtia")
_MINUTE: Final = PERIOD / 60.0  # weight of one sample in an average over a minute
_FEW: Final = 20  # samples that say nothing yet
_NEVER: Final = 1e-9  # a share; 0 would be a word that was not written
_MOST_CODES: Final = 4096
_SIGNAL_STACK: Final = 1 << 20  # bytes; only what is used of it is ever there


class Beat:
    """The background thread of one page. ``main`` is the main thread's identity."""

    def __init__(self, page: ControlPage, main: int) -> None:
        self._page, self._words = page, page.words
        self._main = main
        self._clock = time.pthread_getcpuclockid(main)
        self._cpu, self._cpu_at = 0, 0
        self._place: int | None = None
        self._own, self._samples = 0.0, 0
        self._waits: dict[CodeType, bool] = {}

    def start(self) -> None:
        """Beat from now on, as long as the process lives."""
        self.beat()
        with contextlib.suppress(RuntimeError):  # no more threads: then there is no beat to be missed
            _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        sleep, beat = time.sleep, self.beat
        while True:
            sleep(PERIOD)
            beat()

    def beat(self) -> None:
        """One beat."""
        words, now = self._words, time.monotonic_ns()
        words[Word.BEAT_NS] = now
        if words[Word.FAULT]:
            fault.strike(self._page, self._main)
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return
        # all are asked: each compares with the last beat
        if any((self._is_elsewhere(frame), _is_running(frame), self._is_at_work(now))):
            words[Word.MOVED_NS] = now
        if words[Word.PHASE] == Phase.STEP and words[Word.FIRST_STEP_NS]:
            self._share(0.0 if self._is_waiting(frame.f_code) else 1.0)
        words[Word.STACKS] = _stacks_signal(words[Word.STACKS])
        words[Word.DEBUGGED] = _is_debugged()

    def _is_elsewhere(self, innermost: FrameType) -> bool:
        places: list[int] = []
        frame: FrameType | None = innermost
        while frame is not None and len(places) < 2 * _DEEPEST:
            places += (id(frame.f_code), frame.f_lasti)
            frame = frame.f_back
        before, self._place = self._place, hash(tuple(places))
        return self._place != before

    def _is_at_work(self, now: int) -> bool:
        cpu = time.clock_gettime_ns(self._clock)
        used, passed = cpu - self._cpu, now - self._cpu_at
        self._cpu, self._cpu_at = cpu, now
        return used > _AT_WORK * passed and not _uses_accelerator()

    def _share(self, own: float) -> None:
        """One more sample of whether the time is the rank's own: an average of all, later of the last minute."""
        self._samples += 1
        self._own += max(1 / self._samples, _MINUTE) * (own - self._own)
        if self._samples >= _FEW:
            self._words[Word.OWN_SHARE] = struct.unpack("Q", struct.pack("d", max(self._own, _NEVER)))[0]

    def _is_waiting(self, code: CodeType) -> bool:
        known = self._waits.get(code)
        if known is None:
            if len(self._waits) > _MOST_CODES:
                self._waits.clear()
            known = stacks.is_wait([stacks.Frame(code.co_filename, "", code.co_name)])
            self._waits[code] = known
        return known


def _is_running(innermost: FrameType) -> bool:
    return innermost.f_code.co_code[innermost.f_lasti] in _RUNNING


def _uses_accelerator() -> bool:
    torch = sys.modules.get("torch")
    modules = (getattr(torch, name, None) for name in _ACCELERATORS)
    return any(getattr(module, "_initialized", False) for module in modules)


def _stacks_signal(number: int) -> int:
    """0 once the script has put a handler of its own there."""
    return number if number and signal.getsignal(number) is signal.SIG_DFL else 0


def _is_debugged() -> int:
    """Whether a client is connected to debugpy (VS Code, PyCharm's way too): its main thread may stand at a breakpoint."""
    connected = getattr(sys.modules.get("debugpy"), "is_client_connected", None)
    try:
        return int(bool(connected and connected()))
    except Exception:  # noqa: BLE001 (another package's code, half imported maybe)
        return 0


class _SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def _give_signals_room() -> None:
    """A larger stack for signal handlers than ``faulthandler`` has made.

    Its own takes two frames of a processor with AVX-512 or AMX. All of Python's handlers run on it, so a few signals at
    once would write over the heap. Never given back: signals come until the very end.
    """
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = libc.mmap(None, _SIGNAL_STACK, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
    if address != ctypes.c_void_p(-1).value:
        libc.sigaltstack(ctypes.byref(_SignalStack(address, 0, _SIGNAL_STACK)), None)


def write_stacks_on_request(link: Link) -> None:
    """Have all stacks written to this rank's file at ``SIGNAL``, and when the process crashes."""
    if signal.getsignal(SIGNAL) is not signal.SIG_DFL:
        return
    path = stacks_path(link.runtime, link.attempt, link.local_rank)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    faulthandler.register(SIGNAL, file=fd, all_threads=True, chain=False)
    if not faulthandler.is_enabled():
        faulthandler.enable(file=fd, all_threads=True)
    _give_signals_room()
    link.page[Word.STACKS] = SIGNAL
