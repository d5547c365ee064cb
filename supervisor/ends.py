"""How the ranks of an attempt ended: from what is known of each seat to what is judged."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from supervisor.decide import symptoms
from supervisor.edge import clock, forensics
from supervisor.edge.control import Word
from supervisor.model import RankEnd
from supervisor.seat import Seat


def end_of(seat: Seat, code: int | None, signum: int | None = None) -> RankEnd:
    """The end of a rank with this code or signal; of the moment when it said so, or else of now."""
    return RankEnd(
        rank=seat.rank,
        pid=seat.pid,
        monotonic=seat.raised_at or seat.told_at or clock.monotonic(),
        exit_code=code,
        signal=signum,
        raised=seat.raised,
        step=seat.step if seat.page[Word.FIRST_STEP_NS] or seat.step else None,
        told_exit_code=seat.told_code,
        closed=seat.closed,
        completed=seat.completed,
    )


def gone(seats: Iterable[Seat]) -> list[Seat]:
    """The ranks that ended by themselves, or would have: one that was on its way out with code 0 may be why another failed."""
    seats = list(seats)
    if any(seat.raised or seat.left or (seat.end and seat.end.exit_code != 0) for seat in seats):
        return [seat for seat in seats if seat.end or seat.raised or seat.told_code is not None]
    return [seat for seat in seats if seat.end]


def any_died(seats: Iterable[Seat]) -> bool:
    """Whether a rank has ended by what is no echo of another failure: by a signal (but for gloo's abort), or nobody knows yet how."""
    found = [seat.end for seat in seats if seat.end is not None]
    return any(end.exit_code is None if end.signal is None else end.signal != signal.SIGABRT for end in found)


def complete(seat: Seat, reported: Mapping[int, int], oom_killed: bool, logs: Path) -> RankEnd:
    """Its end with what torchrun ``reported`` (codes by pid), the kernel's word and the last lines of its log."""
    # None: it had not managed to die yet
    end = seat.end or end_of(seat, 1 if seat.told_code is None else seat.told_code)
    code, signum = end.exit_code, end.signal
    if code is None and signum is None:
        told = reported.get(seat.pid, 0)
        code, signum = (None, -told) if told < 0 else (told, None)
    return replace(
        end,
        exit_code=code,
        signal=signum,
        oom_killed=oom_killed and (signum == signal.SIGKILL or symptoms.lost_a_process(end.raised)),
        last_lines=forensics.last_lines(logs / f"rank-{seat.rank}.log"),
    )
