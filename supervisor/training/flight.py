"""One copy behind the training, and the proof that it is the state of its save point.

The thread that copies also checks, as soon as it has copied: what changes only afterwards is no matter of this snapshot, and
the training, when it comes to the fence, has nothing to do but to wait. What is noted at the save point, while the
training stands, is little: the versions of all tensors, and a few bytes, which the kernel gathers in one call.

From a GPU the thread only has it queued, beside the training's stream and after what that had been given by the save point. At
the fence what the optimizer does is queued after the copy: the training goes on, whether that has happened yet or not. As
its CPU may be ahead, the versions are compared there once more.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from array import array
from collections.abc import Callable, Set
from typing import Final

import torch

from supervisor.edge import kernel
from supervisor.training import gpu
from supervisor.training.layout import OutgrownError
from supervisor.training.moves import Moves, Numbers, versions, write_vectors

_WEIGHTS: Final = 512  # that are looked at
_OTHERS: Final = 64  # of an optimizer's tensors, which nothing but the optimizer has a reason to write
_QUEUED_WEIGHTS: Final = 32  # on GPUs, where each costs a copy of its own
_QUEUED_OTHERS: Final = 8
_WINDOW: Final = 64  # bytes of each

#: what is done on the copying thread, and tells what is wrong, if anything is
Work = Callable[[], str | None]

TORN: Final = "parameters or optimizer state changed while they were copied, outside of optimizer.step()"
CAPTURED: Final = "the optimizer's step was captured as a graph while parameters were copied"
OUTGROWN: Final = "a value has outgrown its place"


class Samples:
    """A few bytes of each weight, and of some other tensors: as they were when they were noted, and as they were copied.

    Where there are many, of some all over the model: what swaps all weights is found each time. Where to look is laid out
    ahead. ``number`` tells where: other tensors, or other bytes of them, each time.
    """

    def __init__(self, moves: Moves, scratch: int, number: int) -> None:
        """``scratch`` is a file for the bytes that are noted, of one ``Samples`` at a time."""
        self.moves = moves
        flat = moves.flat
        self._scratch = scratch
        self._size = 0
        self._here = array("Q")
        self._there: list[tuple[int, int]] = []
        for turn, chosen in enumerate(_chosen(moves.flat_numbers, number, _WEIGHTS, _OTHERS)):
            to, source, size = flat[chosen]
            window = min(_WINDOW, size)
            at = (number * 2654435761 + turn) % (size - window + 1)
            self._here.extend((source + at, window))
            self._there.append((to + at, window))
            self._size += window
        self._noted: bytes | None = None
        self._of_gpu = _samples_of_gpu(moves, number)

    def note(self) -> None:
        """Those of now."""
        if self._of_gpu:
            noted, here, _ = zip(*self._of_gpu, strict=True)
            gpu.copy(list(noted), list(here))
        if write_vectors(self._scratch, self._here, 0) == self._size:
            self._noted = None  # it is in the file
        else:
            pairs = zip(self._here[::2], self._here[1::2], strict=True)
            self._noted = b"".join(ctypes.string_at(*pair) for pair in pairs)

    def differ(self) -> bool:
        """Whether what was copied is not what was noted."""
        noted = os.pread(self._scratch, self._size, 0) if self._noted is None else self._noted
        return noted != b"".join(ctypes.string_at(*pair) for pair in self._there)

    def differ_on_gpu(self) -> bool:
        """Likewise, of what was queued, once it has happened."""
        return any(not torch.equal(noted, there) for noted, _, there in self._of_gpu)


def _chosen(numbers: Numbers, turn: int, weights: int, others: int) -> list[int]:
    """At most so many of each, evenly spread; in every ``turn`` others, and all of them in turn."""

    def spread(all_: list[int], most: int) -> list[int]:
        step = max(1, -(-len(all_) // most))
        return all_[turn % step :: step]

    return spread(numbers.weights, weights) + spread(numbers.others, others)


def _samples_of_gpu(moves: Moves, number: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each: where to note it, where it is, and where it is copied to."""
    queued, pairs = moves.queued, []
    for turn, chosen in enumerate(_chosen(moves.queued_numbers, number, _QUEUED_WEIGHTS, _QUEUED_OTHERS)):
        place, view = queued[chosen]
        where = number * 2654435761 + turn
        if view.is_conj() or view.is_neg():
            continue
        if not view.is_contiguous():  # channels last, for one: an element
            element = tuple(where % length for length in view.shape)
            view, place = view[element], place[element]
        here, there = (tensor.reshape(-1).view(torch.uint8) for tensor in (view, place))
        window = min(_WINDOW, len(here))
        at = where % (len(here) - window + 1)
        pairs.append((here[at : at + window], there[at : at + window]))
    if not pairs:
        return []
    noted = gpu.scratch(_WINDOW * len(pairs)).view(-1, _WINDOW)
    return [(noted[number, : len(here)], here, there) for number, (here, there) in enumerate(pairs)]


def new_scratch() -> int:
    """A file in memory for samples, or -1 where there are none (they know what to do then)."""
    try:
        return kernel.memfd("everstep-samples")
    except OSError:
        return -1


class Flight:
    """One copy that runs behind the training. ``rest`` is what else to do before what it copies may change; ``unhurried`` after that.

    Both tell what is wrong, if anything is. ``devices``: those on which something of this snapshot was queued at the save point
    already, or will be by ``unhurried``.
    """

    def __init__(
        self,
        moves: Moves,
        samples: Samples,
        rest: Work | None,
        unhurried: Work | None,
        devices: Set[torch.device] = frozenset(),
    ) -> None:
        self._moves = moves
        self._devices = devices | moves.devices
        self._rest = rest
        self._unhurried = unhurried
        self._samples = samples
        self._versions = versions(moves.counters)
        samples.note()
        self._begin = gpu.mark(self._devices)  # behind the samples
        self._end = self._begin
        self._over = threading.Event()
        self._all_queued = threading.Event()
        self._is_released = False
        self._releasing = threading.Lock()
        self._problems: list[str | None] = []
        self.waited = 0.0  # seconds that ``close`` stood still

    @property
    def problem(self) -> str | None:
        """What is wrong with it, as far as is known; the worst, if that is more than one."""
        return TORN if TORN in self._problems else next(filter(None, self._problems), None)

    def run(self) -> None:
        """Copy, and judge the copy; on the copying thread."""
        try:
            self._try(self._copy_in_time)
            self._all_queued.set()
            self._try(self._copy_in_its_own_time)
        finally:
            self._all_queued.set()
            self._over.set()

    def _try(self, work: Work) -> None:
        try:
            self._problems.append(work())
        except OutgrownError:
            self._problems.append(OUTGROWN)
        except BaseException as error:  # noqa: BLE001 (it is told where the outcome is asked for)
            self._problems.append(f"{type(error).__name__}: {error}")

    def _copy_in_time(self) -> str | None:
        self._copy()
        if versions(self._moves.counters) != self._versions or self._samples.differ():
            return TORN
        return self._rest() if self._rest is not None else None

    def _copy_in_its_own_time(self) -> str | None:
        gpu.wait(self._end)
        if self.problem is None and self._samples.differ_on_gpu():
            return TORN
        return self._unhurried() if self._unhurried is not None and self.problem is None else None

    def _copy(self) -> None:
        with gpu.beside(self._devices):
            gpu.after(self._begin)
            try:
                self._moves.start()
            finally:
                self._end = gpu.mark(self._devices)

    @property
    def is_over(self) -> bool:
        """Whether nothing is copied any more."""
        return self._over.is_set()

    def release(self) -> None:
        """To be called before anything may legitimately change what it copies: that waits for it, on a GPU in its queue."""
        self._wait(self._all_queued)
        if not self._devices:
            return
        with self._releasing:  # optimizers may step in several threads
            if not self._is_released and versions(self._moves.counters) != self._versions:
                self._problems.append(TORN)
            self._is_released = True
        if gpu.is_captured(self._devices):
            self._problems.append(CAPTURED)
        else:
            gpu.after(self._end)

    def close(self) -> None:
        """Wait until it is over."""
        self.release()
        self._wait(self._over)

    def _wait(self, event: threading.Event) -> None:
        if not event.is_set():
            started = time.monotonic()
            event.wait()
            self.waited += time.monotonic() - started
