"""The status of a job as ``everstep status`` prints it: for people, and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from supervisor import numbers
from supervisor.decide import straggler
from supervisor.edge.arenas import Arenas
from supervisor.status import Held, Status
from supervisor.timesheet import Timesheet
from supervisor.wording import count, duration, size

MOST_PROBLEMS: Final = 3  # that are printed


def to_json(status: Status) -> dict[str, Any]:
    """The status as ``everstep status --json`` prints it; ages and times in seconds, goodput as a fraction."""
    record, failure = status.record, status.record.last_failure
    return {
        "dir": str(status.path),
        "run_id": status.run_id,
        "state": status.state.value,
        "reason": status.reason,
        "attempt": record.attempt,
        "world_size": record.world_size,
        "step": status.step,
        "total_steps": status.total_steps,
        "rate": _number(status.rate),
        "metrics": {name: _number(value) for name, value in status.metrics.items()},
        "own_shares": _shares(status.own_shares),
        "slow_rank": straggler.slowest(status.own_shares),
        "slow_node": slow_node(status),
        "nodes": list(status.nodes),
        "live": None
        if status.seen_from is None
        else {"from": status.seen_from, "age_s": round(status.age or 0.0, 3)},
        "warnings": numbers.warnings(record, alive=status.alive),
        "guard": numbers.guard(record),
        "restarts": record.restarts,
        "preemptions": record.preemptions,
        "last_failure": None
        if failure is None
        else {
            "kind": failure.kind.value,
            "rank": failure.rank,
            "reason": failure.reason,
            "attempt": failure.attempt,
            "time": failure.time,
        },
        "snapshot": _held(status.snapshot, status.now),
        "checkpoint": _held(status.checkpoint, status.now),
        "checkpoint_failure": record.drain_failure,
        "deadline": None
        if record.deadline is None or not status.alive
        else {
            "source": record.deadline.source,
            "seconds": round(record.deadline.deadline - status.now, 3),
        },
        "memory": None
        if status.arenas is None
        else {**asdict(status.arenas), "needed": status.arenas.needed},
        "goodput": round(status.spent.goodput, 6),
        "seconds": {name: round(seconds, 3) for name, seconds in asdict(status.spent).items()},
        "lost_steps": record.lost_steps,
        "limits": {
            "failures_left": _left(record.limits.max_failures, record.failures_since_progress),
            "preemptions_left": _left(record.limits.max_preemptions, record.preemptions_since_progress),
        },
        "supervisor": {"alive": status.alive, "host": record.host, "pid": record.pid, "epoch": record.epoch},
        "command": list(record.command),
        "exit_code": record.exit_code,
        "problems": list(status.problems),
    }


def to_text(status: Status) -> str:
    """The status as ``everstep status`` prints it, without a final newline."""
    record, failure = status.record, status.record.last_failure
    rows = [
        ("job", str(status.path)),
        ("state", status.state.value + (f": {status.reason}" if status.reason else "")),
        ("progress", _progress(status)),
        *_live(status),
        *_deadline(status),
        *_slow_rank(status),
        *numbers.rows(record, alive=status.alive),
        ("snapshot", _held_text(status.snapshot, status.now)),
        ("checkpoint", _held_text(status.checkpoint, status.now)),
        *(
            [
                (
                    "",
                    f"a newer one failed {_ago(record.drain_failure_time, status.now)}: {record.drain_failure}",
                )
            ]
            if record.drain_failure
            else []
        ),
        *_memory(status.arenas),
        ("goodput", _goodput(status)),
        ("time", _time(status.spent)),
    ]
    if failure is not None:
        age = duration(status.now - failure.time)
        rows.append(
            (
                "last failure",
                f"{failure.kind.value} in attempt {failure.attempt}, {age} ago: {failure.reason}",
            )
        )
    if record.pid is not None:
        alive = "at work" if status.alive else "gone"
        rows.append(("supervisor", f"pid {record.pid} on {record.host}, {alive}"))
    rows += [("problem", problem) for problem in status.problems[:MOST_PROBLEMS]]
    if len(status.problems) > MOST_PROBLEMS:
        rows.append(("", f"and {len(status.problems) - MOST_PROBLEMS} more, which --json lists"))
    return "\n".join(f"{name:<13} {text}" for name, text in rows)


def _progress(status: Status) -> str:
    record = status.record
    step = f"step {status.step}" + (f" of {status.total_steps}" if status.total_steps else "")
    parts = [step]
    if record.attempt is not None:
        parts.append(f"attempt {record.attempt}")
    if record.world_size is not None:
        parts.append(count(record.world_size, "rank"))
    if status.rate:
        parts.append(f"{status.rate:.3g} steps/s")
        if status.total_steps and status.total_steps > status.step:
            parts.append(f"{duration((status.total_steps - status.step) / status.rate)} to go")
    parts += [f"{name} {value:.4g}" for name, value in status.metrics.items()]
    return ", ".join(parts)


def _deadline(status: Status) -> list[tuple[str, str]]:
    known = status.record.deadline
    if known is None or not status.alive:
        return []
    return [("deadline", f"{known.source} in {duration(known.deadline - status.now)}")]


def _slow_rank(status: Status) -> list[tuple[str, str]]:
    shares, rank = status.own_shares, straggler.slowest(status.own_shares)
    if rank is None:
        return []
    node = slow_node(status)
    where = "" if node is None else f" on {node}"
    text = f"rank {rank}{where}: {shares[rank]:.0%} of its time is its own, the others' {straggler.others(shares, rank):.0%}"
    return [("slow rank", f"{text}: they wait for it")]


def slow_node(status: Status) -> str | None:
    """The name of the node that has the slow rank; None where there is none, or a single node."""
    rank = straggler.slowest(status.own_shares)
    return None if rank is None else straggler.node_of(rank, status.record.world_size, status.nodes)


def _shares(shares: Mapping[int, float]) -> list[float | None]:
    known = (shares.get(rank) for rank in range(max(shares, default=-1) + 1))
    return [None if share is None else round(share, 3) for share in known]


def _live(status: Status) -> list[tuple[str, str]]:
    if status.age is None:
        return []
    return [("live", f"as {status.record.host} told {duration(status.age)} ago")]


def _memory(arenas: Arenas | None) -> list[tuple[str, str]]:
    if arenas is None:
        return []
    parts = [
        f"{arenas.slots} snapshots of {size(arenas.slot)}: {size(arenas.needed)}",
        f"{size(arenas.held)} held in {arenas.place}",
        *([f"{size(arenas.on_disk)} on disk"] if arenas.on_disk else []),
        f"{size(arenas.free)} free there",
        *([f"limit of the cgroup {size(arenas.limit)}"] if arenas.limit is not None else []),
    ]
    return [("memory", ", ".join(parts))]


def _goodput(status: Status) -> str:
    record = status.record
    parts = [
        f"{status.spent.goodput:.1%}",
        f"{count(record.lost_steps, 'step')} done again",
        count(record.restarts, "restart"),
        count(record.preemptions, "preemption"),
    ]
    return ", ".join(parts)


def _time(spent: Timesheet) -> str:
    """What it went into, largest first; what is too short to show is left out."""
    parts = sorted(asdict(spent).items(), key=lambda part: -part[1])
    return (
        ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts if seconds >= 0.05) or "none yet"
    )


def _held(held: Held | None, now: float) -> dict[str, Any] | None:
    if held is None:
        return None
    return {"step": held.step, "age_s": None if held.time is None else round(max(0.0, now - held.time), 3)}


def _held_text(held: Held | None, now: float) -> str:
    if held is None:
        return "none"
    age = "" if held.time is None else f", {duration(now - held.time)} ago"
    where = f", {held.path}" if held.path else ""
    return f"step {held.step}{age}{where}"


def _ago(time: float | None, now: float) -> str:
    return f"{duration(now - time)} ago" if time is not None else "some time ago"


def _left(allowed: int, used: int) -> int:
    return max(0, allowed - used)


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinities."""
    return value if value is not None and math.isfinite(value) else None
