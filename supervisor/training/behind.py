"""What of a snapshot is done behind the next step, and whether it may be: the training's side of ``overlap`` and ``flight``."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch.optim import Optimizer

from supervisor.training import gpu
from supervisor.training.flight import OUTGROWN, TORN, Flight, Samples, Work, new_scratch
from supervisor.training.frozen import WRITTEN
from supervisor.training.moves import Moves
from supervisor.training.overlap import Fence, Helper
from supervisor.training.slots import Slot
from supervisor.training.world import say
from supervisor.training.writer import Finished, StaleError, TornError, Written

_STALE_LAYOUTS: Final = 3  # after as many, this is a state that keeps changing: no look is put off any more
STALE: Final = "the state is not laid out any more as it was"


@dataclass
class _Pending:
    flight: Flight
    written: Callable[[float], Written]
    finished: Finished
    stall: float  # seconds that the training stood


class Behind:
    """Copies behind the steps of ``optimizers``. ``completed`` tells how many steps are complete."""

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        completed: Callable[[], int],
        rank: int,
    ) -> None:
        self._optimizers = optimizers
        self._rank = rank
        self._copying = Helper("everstep-snapshot")
        self._home = threading.get_ident()
        self._process = os.getpid()
        self._pending: _Pending | None = None
        self._numbers = itertools.count()
        self._scratch = new_scratch()
        self._fence = Fence(self._at_fence, completed) if optimizers else None
        self._proof: tuple[Path, Moves] | None = None
        self._proving = threading.Lock()  # optimizers may step in several threads
        self._proven = False
        self._trusted = True
        self._hasty = True  # looks may be put off
        self._stale = 0  # times that they should not have been

    # ------------------------------------------------------------------ whether

    @property
    def may_fly(self) -> bool:
        """Whether a copy may run behind the next step."""
        return self._proven and self._is_ready

    @property
    def may_be_hasty(self) -> bool:
        """Whether, moreover, looks may be put off until then."""
        return self._hasty and self.may_fly

    @property
    def _is_ready(self) -> bool:
        """Whether every optimizer stepped in this step and came through the fence."""
        passed = self._fence is not None and self._fence.all_passed(self._optimizers)
        return passed and self._trusted

    def offer_proof(self, directory: Path, copied: Moves) -> bool:
        """What was copied at once, to be compared with what is there at the next fence. Whether that is needed."""
        is_needed = self._is_ready and not self._proven
        if is_needed:
            self._proof = directory, copied
        return is_needed

    def is_written_over(self, directory: Path) -> None:
        """What was copied there is no proof any more."""
        if self._proof is not None and self._proof[0] == directory:
            self._proof = None

    def start_anew(self) -> None:
        """With another layout."""
        self._proof, self._proven = None, False
        self._hasty = self._stale <= _STALE_LAYOUTS

    # ------------------------------------------------------------------ one copy

    def fly(
        self,
        slot: Slot,
        devices: Set[torch.device],
        rest: Work | None,
        unhurried: Work | None,
        written: Callable[[float], Written],
        finished: Finished,
        started: float,
    ) -> None:
        """Copy ``slot.behind``, then do ``rest``, and then, no optimizer waits for that, what is ``unhurried``.

        Both tell what is wrong, if anything is. On ``devices`` more is queued already, or will be.
        ``finished`` is told what ``written`` makes of the seconds that the training stood since ``started``.
        """
        samples = slot.samples
        if samples is None or samples.moves is not slot.behind:
            samples = Samples(slot.behind, self._scratch, next(self._numbers))
        flight = Flight(slot.behind, samples, rest, unhurried, devices)
        self._copying.start(flight.run)
        self._copying.start(functools.partial(self._choose_samples, slot, slot.behind))
        self._pending = _Pending(flight, written, finished, time.monotonic() - started)

    def _choose_samples(self, slot: Slot, moves: Moves) -> None:
        """Those of the next copy of this slot; on the copying thread."""
        slot.samples = Samples(moves, self._scratch, next(self._numbers))

    def _at_fence(self) -> None:
        """An optimizer is about to step."""
        if os.getpid() != self._process:
            return  # a forked child has its own memory, and no copying thread
        if (pending := self._pending) is not None:
            pending.flight.release()
            if threading.get_ident() == self._home:
                self.poll()
        if self._proof is not None:
            with self._proving:
                self._prove()

    def _prove(self) -> None:
        proof, self._proof = self._proof, None
        if proof is None or gpu.is_captured(proof[1].devices):
            return  # nothing can be looked at now: the next one may prove it
        if proof[1].differs():
            self._distrust(TORN)
        else:
            self._proven = True

    def _distrust(self, problem: str) -> None:
        self._trusted = False
        say(f"rank {self._rank}: {problem}: snapshots are copied while the training waits from here on")

    @property
    def is_busy(self) -> bool:
        """Whether an outcome is outstanding."""
        return self._pending is not None

    def poll(self) -> None:
        """Report what has finished meanwhile; never blocks."""
        if self._pending is not None and self._pending.flight.is_over:
            self.flush()

    def flush(self) -> None:
        """Wait for the copy that is under way, and report it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        flight = pending.flight
        flight.close()
        if flight.problem is None:
            pending.finished(pending.written(pending.stall + flight.waited))
        elif flight.problem in (STALE, OUTGROWN):
            self._hasty, self._stale = False, self._stale + 1
            pending.finished(StaleError(flight.problem))
        elif flight.problem == WRITTEN:
            say(f"rank {self._rank}: {WRITTEN}: they are copied while the training waits from here on")
            pending.finished(TornError(WRITTEN))
        else:
            self._distrust(flight.problem)
            pending.finished(TornError(flight.problem))

    def close(self) -> None:
        """As ``flush``, and for good."""
        self.flush()
        self._copying.close()
        if self._fence is not None:
            self._fence.close()
        if self._scratch >= 0:
            os.close(self._scratch)
            self._scratch = -1
