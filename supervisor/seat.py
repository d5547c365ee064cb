"""One rank of an attempt, as the supervisor knows it."""

from __future__ import annotations

from dataclasses import dataclass

from supervisor.edge.control import ControlPage, SessionFlag, Word
from supervisor.model import Raised, RankEnd


@dataclass(eq=False)
class Seat:
    """One rank of this attempt, from its greeting on."""

    rank: int
    local_rank: int
    pid: int
    pidfd: int | None
    page: ControlPage
    session: bool = False
    completed: bool | None = None  # what its Session said when its loop was left
    raised: Raised | None = None
    raised_at: float = 0.0
    told_code: int | None = None
    told_at: float = 0.0
    left: bool = False  # it fails, and everything of the script's is done
    end: RankEnd | None = None

    @property
    def closed(self) -> bool:
        """Whether its Session's loop was left in order, not by an exception."""
        return bool(self.page[Word.SESSION] & SessionFlag.CLOSED)

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.page[Word.STEP]
