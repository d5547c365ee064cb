"""What a node that does not lead knows of the job for itself: nothing of it is written down."""

from __future__ import annotations

from collections.abc import Callable

from supervisor.ledger import Ledger
from supervisor.model import Fact, FirstStep, Progress, Resumed, Skip
from supervisor.record import JobRecord


class PrivateLedger(Ledger):
    """Takes facts and keeps the few that something on this node asks for."""

    def __init__(self) -> None:
        self._record = JobRecord()

    @property
    def record(self) -> JobRecord:
        """As far as this node cares."""
        return self._record

    def begin(self, attempt: int) -> None:
        """An attempt begins."""
        self._record = self._record.with_(attempt=attempt, resumed_step=None)

    def skips(self, skips: tuple[Skip, ...]) -> None:
        """Steps that are left out, as the leader says."""
        self._record = self._record.with_(skips=skips)

    def listen(self, heard: Callable[[Fact], None]) -> None:
        """Nobody does."""

    def add(self, fact: Fact) -> None:
        """Keep what is asked for."""
        match fact:
            case Resumed(step=step):
                self._record = self._record.with_(resumed_step=step)
            case FirstStep(step=step) | Progress(step=step):
                self._record = self._record.with_(step=step)

    def close(self) -> None:
        """Nothing was written."""
