"""A job's seconds by activity, in cells that lie side by side: columns of wall time, or attempts.

``decide/goodput.py`` keeps one sheet for the whole job: each fact puts down the time since the one before, and then may move
seconds from one entry to another, for what turns out later concerns what has just been. Here the same seconds are kept by
cell. What is put down goes to the cells of its time; what is moved is taken from the newest cells that hold it, backwards,
which is where it was put. So in each activity the cells sum to the job's own sheet, exactly, whatever the resolution.

A ``Ribbon`` has a fixed number of columns. When time runs over its end, every two columns become one of twice the width: it
needs no second pass, and no more memory for a month than for an hour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from supervisor.record import JobRecord
from supervisor.timesheet import Activity

ACTIVITIES: Final = tuple(Activity)
_INDEX: Final = {activity: index for index, activity in enumerate(ACTIVITIES)}
_DUST: Final = 1e-9  # seconds

Move = tuple[int, int, float]


class Change:
    """What one fact did to the job's sheet: ``elapsed`` seconds of ``activity`` from ``start`` on, then moves."""

    def __init__(self, before: JobRecord, after: JobRecord, activity: Activity) -> None:
        self.start = before.last_time if before.last_time is not None else after.last_time or 0.0
        self.elapsed = (after.last_time or 0.0) - self.start
        self.activity = _INDEX[activity]
        self.moves: list[Move] = []
        if before.spent is after.spent:
            return
        old, new = before.spent.__dict__, after.spent.__dict__
        rest = [new[name] - old[name] for name in ACTIVITIES]
        rest[self.activity] -= self.elapsed
        targets = [(index, amount) for index, amount in enumerate(rest) if amount > _DUST]
        sources = [(index, -amount) for index, amount in enumerate(rest) if amount < -_DUST]
        while sources and targets:
            (source, there), (target, wanted) = sources.pop(), targets.pop()
            seconds = min(there, wanted)
            self.moves.append((source, target, seconds))
            if there - seconds > _DUST:
                sources.append((source, there - seconds))
            if wanted - seconds > _DUST:
                targets.append((target, wanted - seconds))


class Cells:
    """Rows of seconds by activity; the last row is the newest."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def open(self) -> None:
        """A new cell begins."""
        self.rows.append([0.0] * len(ACTIVITIES))

    def spend(self, change: Change) -> None:
        """Put a change down in the newest cell, and its moves where they belong."""
        self.rows[-1][change.activity] += change.elapsed
        self.move(change.moves)

    def move(self, moves: Sequence[Move]) -> None:
        """Take seconds from the newest cells that hold them."""
        for source, target, seconds in moves:
            for row in reversed(self.rows):
                part = min(seconds, row[source])
                if part > 0:
                    row[source] -= part
                    row[target] += part
                    seconds -= part
                if seconds <= _DUST:
                    break

    def copy(self) -> Cells:
        """Another one that can be changed apart."""
        twin = Cells()
        twin.rows = [list(row) for row in self.rows]
        return twin


class Ribbon:
    """``columns`` at most, of ``width`` seconds each, from ``start`` (Unix seconds) on."""

    def __init__(self, columns: int = 480, width: float = 0.25) -> None:
        self._most = columns
        self.width = width
        self.start: float | None = None
        self._cells = Cells()

    @property
    def rows(self) -> list[list[float]]:
        """Seconds by activity, column after column; the last one may be partly in the future."""
        return self._cells.rows

    def spend(self, change: Change) -> None:
        """Put a change down in the columns of its time."""
        if self.start is None:
            self.start = change.start
        begin = change.start - self.start
        end = begin + change.elapsed
        self._reach(end)
        for index in range(int(begin / self.width), int(end / self.width) + 1):
            part = min(end, (index + 1) * self.width) - max(begin, index * self.width)
            if part > 0:
                self.rows[index][change.activity] += part
        self._cells.move(change.moves)

    def copy(self) -> Ribbon:
        """Another one that can be changed apart."""
        twin = Ribbon(self._most, self.width)
        twin.start, twin._cells = self.start, self._cells.copy()
        return twin

    def _reach(self, end: float) -> None:
        """Have a column for every moment up to ``end`` (seconds since the start)."""
        while int(end / self.width) >= self._most:
            if len(self.rows) % 2:
                self._cells.open()
            self._cells.rows = [
                [a + b for a, b in zip(one, two, strict=True)]
                for one, two in zip(self.rows[::2], self.rows[1::2], strict=True)
            ]
            self.width *= 2
        while int(end / self.width) >= len(self.rows):
            self._cells.open()
