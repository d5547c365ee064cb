"""Samples a running attempt for early warnings, and journals and says them (the rules are in ``decide/warning.py``)."""

from __future__ import annotations

from typing import Final

from supervisor import shares
from supervisor.attempt import Attempt
from supervisor.config import Options
from supervisor.decide.warning import Change, Lookout, Sample
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.ledger import Ledger
from supervisor.model import Fact, WarningCleared, WarningKind, WarningRaised

PERIOD: Final = 1.0  # seconds
MOST_RANKS: Final = 1024  # of a job in which ranks of other nodes are looked at, too


class Warnings:
    """``begin`` with each attempt, ``look`` by the clock."""

    def __init__(self, options: Options, ledger: Ledger, console: Console) -> None:
        self._ledger, self._console = ledger, console
        self._loss, self._norm = options.guard_loss, options.guard_norm
        self._lookout = Lookout(self._loss, self._norm)
        self._last: tuple[float, int] | None = None  # when the last sample was taken, and after which step
        self._said: set[tuple[WarningKind, int | None]] = set()

    def begin(self) -> None:
        """A new attempt."""
        self._lookout.begin()
        self._last = None
        self._said.clear()

    def look(self, attempt: Attempt) -> None:
        """Take a sample if it is time to, and steps were completed."""
        now = clock.monotonic()
        if self._last is not None and now - self._last[0] < PERIOD:
            return
        step = min(attempt.steps, default=0)
        if self._last is None or step <= self._last[1]:
            self._last = self._last if self._last is not None and step else (now, step)
            return
        seconds = (now - self._last[0]) / (step - self._last[1])
        self._last = now, step
        is_large = (attempt.world_size or 0) > MOST_RANKS
        sample = Sample(
            step,
            attempt.metrics.get(self._loss),
            attempt.metrics.get(self._norm),
            seconds,
            shares.here(attempt) if is_large else shares.everywhere(attempt),
            attempt.world_size,
            shares.nodes(attempt),
        )
        for change in self._lookout.see(sample):
            self._ledger.add(_fact(change, attempt.number))
            if change.text is not None and (change.kind, change.rank) not in self._said:
                self._said.add((change.kind, change.rank))
                self._console.say(f"warning: {change.text}")


def _fact(change: Change, attempt: int) -> Fact:
    kind, step, text, rank = change
    if text is None:
        return WarningCleared(time=clock.now(), kind=kind, step=step, rank=rank)
    return WarningRaised(time=clock.now(), attempt=attempt, kind=kind, step=step, text=text, rank=rank)
