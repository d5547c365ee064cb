"""What the status says of a training's numbers: early warnings, and what the guard has done."""

from __future__ import annotations

from typing import Any

from supervisor.record import JobRecord


def warnings(record: JobRecord, *, alive: bool) -> list[dict[str, Any]]:
    """Those that hold, for programs; none of a job that is not running."""
    if not alive:
        return []
    return [
        {"kind": one.kind.value, "rank": one.rank, "step": one.step, "time": one.time, "text": one.text}
        for one in record.warnings
    ]


def guard(record: JobRecord) -> dict[str, Any]:
    """For programs: ``rollbacks`` over the job's life, ``left_out`` the first step of each window and the one behind it."""
    limits = record.limits
    return {
        "mode": limits.guard,
        "rollbacks": record.rollbacks,
        "rollbacks_left": max(0, limits.guard_times - record.rollbacks_in_a_row),
        "left_out": [[skip.first, skip.stop] for skip in record.skips],
        "levels": list(record.levels),
    }


def rows(record: JobRecord, *, alive: bool) -> list[tuple[str, str]]:
    """For people."""
    lines = [("warning", one.text) for one in record.warnings] if alive else []
    if record.limits.guard == "off" and not record.rollbacks:
        return lines
    count = "1 rollback" if record.rollbacks == 1 else f"{record.rollbacks} rollbacks"
    parts = [record.limits.guard, count]
    if record.skips:
        windows = (
            f"{skip.first}" if skip.stop == skip.first + 1 else f"{skip.first} to {skip.stop - 1}"
            for skip in record.skips
        )
        parts.append(f"left out: steps {', '.join(windows)}")
    if record.levels:
        parts.append(f"new level of the loss: step {', '.join(map(str, record.levels))}")
    return [*lines, ("guard", ", ".join(parts))]
