"""``D/live.json``: what the control pages say, for whoever looks from a host where they are not, and of the ranks of all nodes.

It is replaced whole, so a reader finds one state or the next: over NFS, too, as a file that is opened is asked for at the server. It is
of no use to anybody later, so it is not synced, and whatever is wrong with it is as if it were not there.

How old it is cannot be told well: the clocks of the writer, the reader and the file server differ. So nothing is decided by the
reader's clock. That the file is of the supervisor at work is told by the epoch and the attempt; that it is not left from when it could
still be written, by the journal, in which the same supervisor writes the times of the same clock. The age is only shown: a reader that looks
again and again counts from the change that it has seen itself, one that looks once has the file's own time and no better.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.edge import plain

NAME: Final = "live.json"
FORMAT: Final = 1
MOST: Final = 4 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Told:
    """Its content."""

    format: int
    run_id: str
    epoch: int
    attempt: int
    written: float  # Unix seconds of the supervisor's clock
    step: int
    total_steps: int | None = None
    saved_step: int | None = None
    saved_time: float | None = None
    loss: float | None = None
    world_size: int = 0
    own_shares: tuple[int, ...] = ()  # percent, by rank; -1: not known
    nodes: tuple[str, ...] = ()  # names, by rank, where there are several


def write(job: Path, told: Told) -> None:
    """Replace it. Raises OSError; then what was there is there still."""
    path = job / NAME
    temporary = path.with_name(f".{NAME}.{told.epoch}")
    try:
        temporary.write_text(json.dumps(plain.to_sparse(told), allow_nan=False, separators=(",", ":")))
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read(job: Path) -> tuple[Told, float] | None:
    """What is there, and the file's own time; None where nothing is that this version understands."""
    try:
        with open(job / NAME, "rb") as file:
            content, modified = file.read(MOST + 1), os.fstat(file.fileno()).st_mtime
        raw = json.loads(content)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            return None
        told = plain.from_plain(Told, raw)
        is_sound = math.isfinite(told.written) and math.isfinite(told.saved_time or 0.0)
        return (told, modified) if is_sound else None
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return None


def remove(job: Path) -> None:
    """The job is over. Raises OSError."""
    (job / NAME).unlink(missing_ok=True)
