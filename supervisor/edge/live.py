"""Looking at a live job from outside, without disturbing it: is its lock held, and what do the control pages of this host say."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.edge import clock
from supervisor.edge.control import ControlPage, Word
from supervisor.edge.link import control_folder


@dataclass(frozen=True, kw_only=True)
class Live:
    """What the control pages say: the slowest rank counts."""

    step: int
    total_steps: int | None = None
    saved_step: int | None = None  # newest snapshot of every rank
    saved_time: float | None = None  # Unix seconds when the last rank completed its newest one
    loss: float | None = None
    own_shares: dict[int, float] = field(default_factory=dict)  # by rank, where known (decide/straggler.py)
    ranks: int = 0  # … of which it speaks
    nodes: tuple[str, ...] = ()  # the names of the attempt's nodes, by rank, where there are several
    age: float | None = (
        None  # seconds, of what came by the live file; None: the control pages, as they are now
    )


def is_held(lock: Path) -> bool:
    """Whether a supervisor holds the job; looks for microseconds, which who takes the lock must bear with."""
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def read_live(runtime: Path, attempt: int) -> Live | None:
    """What this host's control pages of one attempt say; None when they cannot be read (an attempt ends, another user's job)."""
    pages: list[ControlPage] = []
    try:
        for path in sorted(control_folder(runtime, attempt).glob("rank-*"), key=_local_rank):
            pages.append(ControlPage(path))  # noqa: PERF401 (those opened are closed whatever happens)
        return of_pages(pages)
    except (OSError, ValueError):
        return None
    finally:
        for page in pages:
            page.close()


def _local_rank(page: Path) -> int:
    return int(page.name.rpartition("-")[2])


def of_pages(pages: Sequence[ControlPage]) -> Live | None:
    """What the pages of all ranks of a node say, in the order of the ranks; None without any."""
    if not pages:
        return None
    saved = min(page[Word.SAVED_STEP] for page in pages)
    moment = max(page[Word.SAVED_NS] for page in pages)
    loss = pages[0].loss
    shares = [page.double(Word.OWN_SHARE) for page in pages]
    return Live(
        step=min(page[Word.STEP] for page in pages),
        total_steps=max(page[Word.TOTAL_STEPS] for page in pages) or None,
        saved_step=saved - 1 if saved else None,
        saved_time=clock.unix_of(moment) if saved and moment else None,
        loss=None if math.isnan(loss) else loss,
        own_shares={rank: share for rank, share in enumerate(shares) if not math.isnan(share)},
        ranks=len(pages),
    )
