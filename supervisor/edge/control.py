"""The control page: 4 KiB of shared memory per rank, through which worker and supervisor talk in nanoseconds.

Each field has one writer and is one aligned 8-byte word, so a reader sees an old or a new value, never a mix. The
worker writes its words (step, phase, heartbeat, …), the supervisor writes the save proposal, a rehearsal asks for a fault. The proposal is a small
protocol of its own (theory in ``decide/savepoint.py``): the supervisor fills ``PROPOSAL_STEP`` and ``PROPOSAL_FLAGS``
first and ``PROPOSAL`` (serial << 2 | verdict) last; the worker publishes ``STEP`` first and reads ``PROPOSAL`` after.

The file lies in the job's runtime directory (tmpfs) as ``control/<attempt>/rank-<local rank>`` and survives its worker, so
that the supervisor can read the last words of a dead rank.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from pathlib import Path

from supervisor.model import ProposalFlag, ProposalState

__all__ = [
    "MAGIC",
    "SIZE",
    "SLOTS",
    "ControlPage",
    "Fault",
    "Phase",
    "ProposalFlag",
    "ProposalState",
    "SessionFlag",
    "Word",
]

MAGIC = 0x45565253_54455031  # "EVRSTEP1"
SIZE = 4096
SLOTS = 3  # of RAM snapshots, on each node


class Word(enum.IntEnum):
    """Index of each 8-byte word. The first block is the worker's, the second the supervisor's."""

    MAGIC = 0
    PID = 1
    STEP = 2  # completed steps
    TOTAL_STEPS = 3  # 0: not known
    PHASE = 4
    HEARTBEAT_NS = 5  # CLOCK_MONOTONIC
    SAVED_STEP = 6  # step of the newest snapshot this rank completed, plus one; 0: none
    LOSS = 7  # a double
    SESSION = 8  # SessionFlag
    SAVED_NS = 10  # CLOCK_MONOTONIC when that was; written before SAVED_STEP
    FIRST_STEP_NS = 9  # CLOCK_MONOTONIC when the attempt's first step was completed; 0: not yet
    SAVE_NS = 23  # how long its longest save point took, once it has completed a snapshot; 0: it has not
    # by the worker's background thread (launch/vital.py)
    BEAT_NS = 16  # CLOCK_MONOTONIC of its last beat; 0: there is none
    MOVED_NS = 17  # CLOCK_MONOTONIC when it last saw the main thread move
    OWN_SHARE = (
        18  # a double: of the last minute of steps, the part that was not spent waiting for other ranks
    )
    DEBUGGED = 19  # 1: a debugger inside of the process is connected
    STACKS = 20  # number of the signal that has all stacks written; 0: none does
    PROVEN = 22  # by the guard: steps after which the state is known to be in order, plus one; 0: not known
    STRUCK_NS = 21  # CLOCK_MONOTONIC when it did what FAULT asked for; written just before

    PROPOSAL = 64  # serial << 2 | ProposalState
    PROPOSAL_STEP = 65  # save when this many steps are complete
    PROPOSAL_FLAGS = 66  # ProposalFlag
    FREE_SLOT = (
        67  # serial << 8 | snapshot slot to write next, plus one; 0: none is free, skip the save point
    )

    # by `everstep rehearse`
    FAULT = 128  # Fault; the worker's background thread takes it back to 0 as it strikes


def offer_word(serial: int, slot: int) -> int:
    """What ``Word.FREE_SLOT`` says when ``slot`` is offered for the ``serial``-th time."""
    return serial << 8 | slot + 1


def offered_slot(word: int) -> int | None:
    """The slot that ``Word.FREE_SLOT`` names; None: none is free."""
    return (word & 0xFF) - 1 if word else None


class Phase(enum.IntEnum):
    """What a worker is doing."""

    IMPORTING = 0
    SETUP = 1  # the user's script runs, no step yet
    RESTORE = 2
    STEP = 3
    SAVE = 4
    EVALUATE = 5
    CLOSED = 6  # the training loop is over, the script goes on


class Fault(enum.IntEnum):
    """What a worker is asked to do to itself (``launch/fault.py``)."""

    RAISE = 1
    OUT_OF_MEMORY = 2
    STICK = 3


class SessionFlag(enum.IntFlag):
    """Whether the worker uses a Session, and whether it left the loop in order."""

    OPEN = 1
    CLOSED = 2


class ControlPage:
    """One rank's page, mapped. ``page[Word.STEP]`` reads and ``page[Word.STEP] = n`` writes one word atomically."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if create:
                os.ftruncate(fd, SIZE)
            self._map = mmap.mmap(fd, SIZE)
        finally:
            os.close(fd)
        #: the words themselves, for the hot path
        self.words = memoryview(self._map).cast("Q")
        if create:
            for index in range(len(self.words)):
                self.words[index] = 0
            self.words[Word.MAGIC] = MAGIC
        elif self.words[Word.MAGIC] != MAGIC:
            raise ValueError(f"{path} is no control page of this version")

    def __getitem__(self, word: Word) -> int:
        return self.words[word]

    def __setitem__(self, word: Word, value: int) -> None:
        self.words[word] = value

    @property
    def loss(self) -> float:
        """The last logged loss; NaN when none was."""
        return self.double(Word.LOSS)

    @loss.setter
    def loss(self, value: float) -> None:
        self.words[Word.LOSS] = struct.unpack("Q", struct.pack("d", value))[0]

    def double(self, word: Word) -> float:
        """A word that is a double; NaN when it was never written."""
        raw = self.words[word]
        return float(struct.unpack("d", struct.pack("Q", raw))[0]) if raw else float("nan")

    def close(self) -> None:
        """Unmap the page. Reading or writing it afterwards raises ValueError."""
        self.words.release()
        self._map.close()
