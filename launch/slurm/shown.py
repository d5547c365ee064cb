"""What ``scontrol`` shows, read; and what follows from it for a job that wants to run again. Pure.

Seen with 22.05, and what the rules below rest on:

- A job whose end has begun is shown as COMPLETING, whatever the reason: cancelled, over its time limit (``Reason`` says
  ``TimeLimit``), requeued by somebody (``Restarts`` is one more than what the job was told of at its start).
- ``scontrol requeue`` succeeds while the job is RUNNING, in the grace of a preemption, and when the time limit has struck; a
  second one is refused ("Job is pending execution"). A cancelled job could be requeued, too: it must not be.
- During the grace of a preemption the job is RUNNING, and its EndTime is when the grace ends. Preempted jobs whose batch
  script ends within the grace are over for good: SLURM requeues only those that it has to end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

#: for ``scontrol``'s environment: times as Unix seconds instead of local dates
TIME_FORMAT: Final = {"SLURM_TIME_FORMAT": "%s"}
_LIMIT: Final = re.compile(r"(?:([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)")
_SECONDS: Final = re.compile(r"([0-9]+)(?: sec)?")


@dataclass(frozen=True, kw_only=True)
class ShownJob:
    """A job as SLURM has it. Times in Unix seconds; None: unlimited, or not known."""

    state: str
    reason: str
    restarts: int
    requeue: bool  # whether SLURM may requeue it
    batch: bool  # sbatch has submitted it: there is a script to start again
    end_time: float | None
    preempt_time: float | None


def parse_job(text: str) -> ShownJob | None:
    """From ``scontrol --oneliner show job ID``, with TIME_FORMAT; None when that is not what it is."""
    found = fields(text)
    if not {"JobState", "Requeue"} <= found.keys():
        return None
    return ShownJob(
        state=found["JobState"],
        reason=found.get("Reason", ""),
        restarts=int(_time(found.get("Restarts")) or 0),
        requeue=found["Requeue"] == "1",
        batch=found.get("BatchFlag") == "1",
        end_time=_time(found.get("EndTime")),
        preempt_time=_time(found.get("PreemptTime")),
    )


def fields(text: str) -> dict[str, str]:
    """``Name=value …`` on one line, as ``scontrol --oneliner`` shows jobs and partitions."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def parse_config(text: str) -> dict[str, str]:
    """From ``scontrol show config``: name → value, as it is shown there."""
    lines = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in lines}


def seconds(config: Mapping[str, str], name: str) -> float | None:
    """A setting of the kind ``30 sec``; None when it is not there."""
    found = _SECONDS.fullmatch(config.get(name, ""))
    return float(found[1]) if found else None


def limit(text: str | None) -> float | None:
    """Seconds of a limit such as ``1-02:00:00``, ``00:10:00``; None where there is none (UNLIMITED, …)."""
    found = _LIMIT.fullmatch(text or "")
    if found is None:
        return None
    days, hours, mins, secs = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + mins) * 60 + secs)


@dataclass(frozen=True, kw_only=True)
class Again:
    """Whether to ask SLURM to run the job again. ``why``: one line for the user, where there is something to say."""

    ask: bool
    why: str | None = None


def again(job: ShownJob, restarts: int) -> Again:
    """Whether a job that has saved its state must be requeued by us. ``restarts``: what it was told at its start."""
    if job.restarts > restarts or job.state == "PENDING":
        return Again(ask=False, why="SLURM has requeued the job")
    over = job.state == "COMPLETING" and job.reason != "TimeLimit"
    if over or job.state.startswith("CANCELLED"):
        return Again(ask=False, why="the job was cancelled, so it is not requeued")
    if not job.batch:
        return Again(ask=False, why="SLURM cannot requeue an interactive job: run the same command again")
    if not job.requeue:
        return Again(
            ask=False, why="the job may not be requeued (sbatch --requeue, JobRequeue): submit it again"
        )
    return Again(ask=True)


def _time(text: str | None) -> float | None:
    return float(text) if text and text.isascii() and text.isdigit() else None
