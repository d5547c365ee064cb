"""One rank of an attempt, as the supervisor knows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from supervisor.edge import clock
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

    def ended_with(self, code: int | None, signum: int | None = None) -> RankEnd:
        """How it ended, with what it had said until then."""
        return RankEnd(
            rank=self.rank,
            pid=self.pid,
            monotonic=self.raised_at or self.told_at or clock.monotonic(),
            exit_code=code,
            signal=signum,
            raised=self.raised,
            step=self.step if self.page[Word.FIRST_STEP_NS] or self.step else None,
            told_exit_code=self.told_code,
            closed=self.closed,
            completed=self.completed,
        )


def gone(seats: Iterable[Seat]) -> list[Seat]:
    """The ranks that ended by themselves, or would have: one that was on its way out with code 0 may be why another failed."""
    seats = list(seats)
    if any(seat.raised or seat.left or (seat.end and seat.end.exit_code != 0) for seat in seats):
        return [seat for seat in seats if seat.end or seat.raised or seat.told_code is not None]
    return [seat for seat in seats if seat.end]
