"""The ranks of one host agree on numbers through memory that they share, in microseconds.

A collective of gloo's wakes threads of its own and goes through sockets: a third of a millisecond for two ranks with a core
each, and many where they have to share cores. Here a rank writes its numbers into its row of one page and wakes the first
rank of the host; that one takes the maxima, has the first ranks of all hosts agree where there are several, and
writes the outcome for the others to read. A round is over when its number is in the *outcome* row; since a rank enters the
next only then, one row each is enough.

The memory is a memfd of the host's first rank, which the others open by ``/proc``: it has no name that could be left behind.
Where that cannot be done (``/proc`` is hidden, or the machine has no futex here) there is no huddle, and gloo does it all.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import select
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from supervisor.edge import futex, kernel

Reduce = Callable[[Sequence[int]], list[int]]

MOST: Final = 7  # numbers in a row
_ROW: Final = 1 + MOST  # words of 8 bytes: the round (its lower half), and the numbers
_SPINS: Final = 300  # looks, some 20 µs, before sleeping
#: then it is asked whether who is waited for still lives; ever more seldom, since to ask is to stir, and who stirs does not hang
_LIMITS: Final = [futex.timeout(seconds) for seconds in (0.2, 0.4, 0.8, 1.6)]
_ROUNDS: Final = 1 << 32


def whereabouts() -> int:
    """A number, of 62 bits, that is the same for processes that can open each other's files under ``/proc``; 0: not known."""
    if not futex.IS_AVAILABLE:
        return 0
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        return (int(boot, 16) ^ os.stat("/proc/self/ns/pid").st_ino * 0x9E3779B97F4A7C15) % (1 << 62)
    except (OSError, ValueError):
        return 0


def _name(mark: int) -> str:
    return f"everstep-huddle-{mark:x}"


@contextlib.contextmanager
def lent(ranks: int, mark: int) -> Iterator[int]:
    """The descriptor of memory for so many ranks, until they have opened it; it stays for those who have. -1: there is none.

    ``mark``: a random number, by which they know it again.
    """
    fd = -1
    with contextlib.suppress(OSError):
        fd = kernel.memfd(_name(mark))
        os.ftruncate(fd, (ranks + 1) * _ROW * 8)
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def join(members: Sequence[int], place: int, fd: int, mark: int, across: Reduce | None) -> Huddle | None:
    """The huddle; None when its memory cannot be had, or who is in it cannot be watched."""
    try:
        return Huddle(members, place, fd, mark, across)
    except (OSError, ValueError):  # ValueError: it is shorter than it should be
        return None


class Huddle:
    """``members``: the processes of the host's ranks, the first one's first; ``place``: this one's among them.

    ``fd``: of the first one's memory, with its ``mark``. ``across`` is what the first rank does to have the hosts agree; None: there
    is only this one. Raises OSError or ValueError when the memory cannot be had.
    """

    def __init__(self, members: Sequence[int], place: int, fd: int, mark: int, across: Reduce | None) -> None:
        self._place, self._across = place, across
        self._pids = list(members)
        memory = _memory_of(members[0], fd, mark, (len(members) + 1) * _ROW * 8)
        # whom it waits for is held from now on: what ends later is told from what has taken its number, without a descriptor more
        self._ends: dict[int, select.poll] = {}
        for other in [0] if place else range(1, len(members)):
            pidfd = kernel.pidfd_open(members[other])
            weakref.finalize(self, os.close, pidfd).atexit = False
            self._ends[other] = select.poll()
            self._ends[other].register(pidfd, select.POLLIN)
        self._words = memoryview(memory).cast("q")
        self._rounds = memoryview(memory).cast("I")[:: 2 * _ROW]
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._round = 0
        self._is_agreeing = False

    def largest(self, values: Sequence[int]) -> list[int]:
        """The element-wise maximum over all ranks, on every rank; each gives as many values, up to ``MOST``. Collective.

        Raises ConnectionError when a rank of this host has died; RuntimeError when an exception, such as a signal handler's, has
        broken off the agreement before: this rank does not know then where the others are.
        """
        if len(values) > MOST:
            raise ValueError(f"{len(values)} numbers, {MOST} have room")
        if self._is_agreeing:
            raise RuntimeError("an exception broke off an agreement of the ranks: they cannot agree any more")
        self._is_agreeing = True
        largest = self._agree(values)
        self._is_agreeing = False
        return largest

    def _agree(self, values: Sequence[int]) -> list[int]:
        self._round = (self._round + 1) % _ROUNDS
        outcome = len(self._pids)
        if self._place:
            self._publish(self._place, values)
            self._await(outcome, of=0)
            return self._read(outcome, len(values))
        rows = [values]
        for place in range(1, len(self._pids)):
            self._await(place, of=place)
            rows.append(self._read(place, len(values)))
        largest = [max(column) for column in zip(*rows, strict=True)]
        if self._across is not None:
            largest = self._across(largest)
        self._publish(outcome, largest)
        return largest

    def _publish(self, row: int, values: Sequence[int]) -> None:
        at = row * _ROW + 1
        for offset, value in enumerate(values):
            self._words[at + offset] = value
        address = self._address + row * _ROW * 8
        futex.wake(address + 4)  # the barrier; nobody waits there
        self._rounds[row] = self._round
        futex.wake(address)

    def _await(self, row: int, *, of: int) -> None:
        """Until the row is of this round. The interpreter stands in one place meanwhile, as in a collective."""
        rounds, number = self._rounds, self._round
        for _ in range(_SPINS):
            if rounds[row] == number:
                break
        address = self._address + row * _ROW * 8
        limits = itertools.chain(_LIMITS, itertools.repeat(_LIMITS[-1]))
        while (seen := rounds[row]) != number:
            futex.wait(address, seen, next(limits))
            if rounds[row] != number and self._ends[of].poll(0) and rounds[row] != number:
                raise ConnectionError(
                    f"connection closed by peer: process {self._pids[of]}, a rank of this host, has ended"
                )
        futex.wake(address + 4)  # the barrier

    def _read(self, row: int, count: int) -> list[int]:
        at = row * _ROW + 1
        return self._words[at : at + count].tolist()


def _memory_of(pid: int, fd: int, mark: int, size: int) -> mmap.mmap:
    path = f"/proc/{pid}/fd/{fd}"
    if _name(mark) not in os.readlink(path):  # before anything of somebody else's is opened
        raise FileNotFoundError(f"{path} is something else")
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)
