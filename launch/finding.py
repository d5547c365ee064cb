"""Which job is meant where no directory is given."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from supervisor.errors import UsageError

RUNS: Final = Path("everstep-runs")


def find_job(given: str | None) -> Path:
    """The job directory meant: ``--dir``, else the one that was active last below ``everstep-runs``."""
    if given is not None:
        return Path(given).expanduser().absolute()
    newest, *others = find_jobs(None)
    if others:
        print(f"everstep: {newest}, the newest of {len(others) + 1} jobs; --dir chooses", file=sys.stderr)
    return newest


def find_jobs(given: Sequence[str] | None) -> list[Path]:
    """The job directories meant: those given, else all below ``everstep-runs``, the one that was active last first."""
    if given:
        return [Path(each).expanduser().absolute() for each in given]
    jobs = [path.parent for path in RUNS.absolute().glob("*/job.json")]
    if not jobs:
        raise UsageError(f"no job in {RUNS.absolute()}: give --dir D")
    return sorted(jobs, key=_last_active, reverse=True)


def _last_active(job: Path) -> float:
    files = [job / "job.json", *(job / "journal").glob("*.jsonl")]
    return max((time for file in files if (time := _changed(file)) is not None), default=0.0)


def _changed(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:  # gone, or not ours to look at
        return None
