"""One copy behind the training, and the proof that it is the state of its save point.

The thread that copies also checks, as soon as it has copied: what changes only afterwards is no matter of this snapshot, and
the training, when it comes to the fence, has nothing to do but to wait. What is noted at the save point, while the
training stands, is little: the versions of all tensors, and a few bytes, which the kernel gathers in one call.
"""

from __future__ import annotations

import ctypes
import operator
import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Final

import torch

from supervisor.training.layout import OutgrownError
from supervisor.training.moves import Moves, write_vectors

_SAMPLES: Final = 64  # tensors
_WINDOW: Final = 64  # bytes of each
_version: Final = operator.attrgetter("_version")

TORN: Final = "parameters or optimizer state changed while they were copied, outside of optimizer.step()"
OUTGROWN: Final = "a value has outgrown its place"


class Samples:
    """A few bytes of each of a few tensors: as they were when they were noted, and as they were copied.

    Where to look is laid out ahead. ``number`` tells where: other tensors, or other bytes of them, each time.
    """

    def __init__(self, moves: Moves, scratch: int, number: int) -> None:
        """``scratch`` is a file for the bytes that are noted, of one ``Samples`` at a time."""
        self.moves = moves
        flat = moves.flat
        self._scratch = scratch
        self._size = 0
        self._here = array("Q")
        self._there: list[tuple[int, int]] = []
        for turn in range(min(_SAMPLES, len(flat))):
            to, source, size = flat[(number * _SAMPLES + turn) % len(flat)]
            window = min(_WINDOW, size)
            at = (number * 2654435761 + turn) % (size - window + 1)
            self._here.extend((source + at, window))
            self._there.append((to + at, window))
            self._size += window
        self._noted: bytes | None = None

    def note(self) -> None:
        """Those of now."""
        if write_vectors(self._scratch, self._here, 0) == self._size:
            self._noted = None  # it is in the file
        else:
            pairs = zip(self._here[::2], self._here[1::2], strict=True)
            self._noted = b"".join(ctypes.string_at(*pair) for pair in pairs)

    def differ(self) -> bool:
        """Whether what was copied is not what was noted."""
        noted = os.pread(self._scratch, self._size, 0) if self._noted is None else self._noted
        return noted != b"".join(ctypes.string_at(*pair) for pair in self._there)


class Flight:
    """One copy that runs behind the training. ``rest`` is what else to do then; what is wrong, if anything is."""

    def __init__(self, moves: Moves, samples: Samples, rest: Callable[[], str | None]) -> None:
        self._moves = moves
        self._rest = rest
        self._samples = samples
        self._versions = versions(moves.tensors)
        samples.note()
        self._over = threading.Event()
        self.problem: str | None = None
        self.waited = 0.0  # seconds that ``close`` stood still

    def run(self) -> None:
        """Copy, and judge the copy; on the copying thread."""
        try:
            self._moves.run()
            if versions(self._moves.tensors) != self._versions or self._samples.differ():
                self.problem = TORN
            else:
                self.problem = self._rest()
        except OutgrownError:
            self.problem = OUTGROWN
        except BaseException as error:  # noqa: BLE001 (it is told where the outcome is asked for)
            self.problem = f"{type(error).__name__}: {error}"
        self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether nothing is copied any more."""
        return self._over.is_set()

    def close(self) -> None:
        """Wait for it: to be called before anything may legitimately change what it copies."""
        if not self._over.is_set():
            started = time.monotonic()
            self._over.wait()
            self.waited += time.monotonic() - started


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each tensor was written in place."""
    return list(map(_version, tensors))
