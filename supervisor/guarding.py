"""The supervisor's half of the numeric guard (the theory is in ``decide/guard.py``): hears the ranks, and ends the attempt.

A rank tells of trouble before it tells that its part of a later snapshot is whole, on the same connection. So no snapshot of a
state beyond the trouble becomes complete without the supervisor knowing of it.
"""

from __future__ import annotations

from typing import Any

from supervisor.attempt import Attempt
from supervisor.decide import guard
from supervisor.edge import clock
from supervisor.edge.control import Word
from supervisor.failing import Trouble, TroubleKind
from supervisor.seat import Seat


class Guarding:
    """What the ranks of one attempt have seen."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._seen: dict[int, Trouble] = {}

    def hear(self, seat: Seat, message: dict[str, Any]) -> None:
        """One rank tells of trouble. ValueError, KeyError and TypeError refuse it."""
        usual, limit, good = message["usual"], message["limit"], message["good"]
        self._seen[seat.rank] = Trouble(
            kind=TroubleKind(message["finding"]),
            metric=str(message["metric"]),
            rank=seat.rank,
            step=int(message["step"]),
            value=float(message["value"]),
            usual=None if usual is None else float(usual),
            limit=None if limit is None else float(limit),
            good=None if good is None else int(good),
            monotonic=clock.monotonic(),
            batches={str(name): int(count) for name, count in dict(message["batches"]).items()},
        )
        watching = {each.rank for each in self._attempt.seats.values() if each.page[Word.PROVEN]}
        agreed = guard.agree(self._seen, len(watching | self._seen.keys()))
        if agreed is not None:
            self._attempt.goes_wrong(agreed)


def proven(attempt: Attempt) -> int | None:
    """The steps after which the state is known to be in order, by all ranks that watch; None: nobody says."""
    words = [seat.page[Word.PROVEN] for seat in attempt.seats.values()]
    return min((word - 1 for word in words if word), default=None)
