"""How a job stands, for people and for programs: its journal, and what its live workers' control pages say beyond it.

The journal alone describes a job that is over. While a supervisor holds the job's lock on this host, steps, loss and the
newest snapshot come from the control pages, which are never more than a step old. A journal that ends in the middle of
the work while nobody holds the lock tells of a supervisor that was killed: such a job can be resumed, so it is shown
as preempted.
"""

from __future__ import annotations

import math
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from supervisor import numbers
from supervisor.decide import goodput, lifecycle, straggler
from supervisor.edge import arenas
from supervisor.edge.arenas import Arenas
from supervisor.edge.jobdir import JobDirectory
from supervisor.edge.live import Live, is_held, read_live
from supervisor.errors import JobError
from supervisor.model import State
from supervisor.record import JobRecord
from supervisor.replay import Replay
from supervisor.timesheet import Timesheet


@dataclass(frozen=True, kw_only=True)
class Held:
    """A consistent state of the job at ``step``."""

    step: int
    time: float | None  # None: it is not in the journal yet, so nobody noted when
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class Status:
    """A job at ``now``. ``record`` is the journal's; the other fields are what is true beyond it."""

    path: Path
    now: float
    record: JobRecord
    state: State
    reason: str | None
    alive: bool  # a supervisor holds the job
    step: int
    total_steps: int | None
    rate: float | None
    spent: Timesheet
    snapshot: Held | None
    checkpoint: Held | None
    metrics: dict[str, float]
    own_shares: dict[int, float] = field(default_factory=dict)  # by rank (decide/straggler.py)
    arenas: Arenas | None = None  # this node's
    run_id: str | None = None
    problems: tuple[str, ...] = ()  # lines of the journal that could not be used


class Watch:
    """Looks at one job again and again, and reads of its journal only what is new."""

    def __init__(self, job_dir: Path) -> None:
        self._given = job_dir
        self._job = JobDirectory(job_dir)
        self._folded = Replay(self._job.journal)

    def look(self, now: float) -> Status:
        """The job's status. Raises JobError when there is no job or it cannot be read."""
        job = self._job
        file = job.read()
        if file is None and not job.journal.is_dir():
            raise JobError(f"no job in {job.path}: `everstep run --dir {self._given} …` starts one")
        alive = is_held(job.path / "lock")
        self._folded.advance()
        record = self._folded.record
        if not alive:  # it may have been taken while the journal was read
            alive = is_held(job.path / "lock")
        live = None
        # before an attempt's first step, the pages may still be those of the one before
        started = record.attempt_first_time is not None
        if alive and started and file is not None and record.host == socket.gethostname():
            live = read_live(Path(file.runtime), record.attempt or 0)
        return describe(
            job.path,
            record,
            now,
            alive=alive,
            live=live,
            arenas=arenas.measure(Path(file.runtime), record.pid) if live and file is not None else None,
            run_id=file.run_id if file is not None else None,
            problems=self._folded.problems,
        )


def read_status(job_dir: Path, now: float) -> Status:
    """The status of the job in ``job_dir``, once. Raises JobError when there is none or it cannot be read."""
    return Watch(job_dir).look(now)


def describe(
    path: Path,
    record: JobRecord,
    now: float,
    *,
    alive: bool,
    live: Live | None = None,
    arenas: Arenas | None = None,
    run_id: str | None = None,
    problems: tuple[str, ...] = (),
) -> Status:
    """The journal's record and what is known beyond it, put together."""
    state, reason = _state(record, alive=alive)
    step = max(record.step, live.step) if live else record.step
    over = lifecycle.is_over(record.state)
    spent = goodput.at(record, step, now) if alive and not over else record.spent
    total = live.total_steps if live and live.total_steps else record.total_steps
    metrics = {**record.metrics, "loss": live.loss} if live and live.loss is not None else record.metrics
    snapshot, checkpoint = (
        None if point is None else Held(step=point.step, time=point.time, path=point.path)
        for point in (record.snapshot, record.checkpoint)
    )
    if live and live.saved_step is not None and (snapshot is None or live.saved_step > snapshot.step):
        snapshot = Held(step=live.saved_step, time=live.saved_time)
    return Status(
        path=path,
        now=now,
        record=record,
        state=state,
        reason=reason,
        alive=alive,
        step=step,
        total_steps=total,
        rate=_rate(record, step, now) if alive else None,
        spent=spent,
        snapshot=snapshot,
        checkpoint=checkpoint,
        metrics=metrics,
        own_shares=live.own_shares if live else {},
        arenas=arenas,
        run_id=run_id,
        problems=problems,
    )


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
        "own_shares": [round(share, 3) for _, share in sorted(status.own_shares.items())],
        "slow_rank": straggler.slowest(status.own_shares),
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
    rows += [("problem", problem) for problem in status.problems]
    return "\n".join(f"{name:<13} {text}" for name, text in rows)


def duration(seconds: float) -> str:
    """``0.4 s``, ``42 s``, ``3 min``, ``5 h 20 min``, ``2 d 3 h``."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(count: float) -> str:
    """Bytes: ``512 B``, ``1.5 MB``, ``20 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# --------------------------------------------------------------------------- parts


def _state(record: JobRecord, *, alive: bool) -> tuple[State, str | None]:
    if alive or record.state is State.NEW or lifecycle.is_over(record.state):
        return record.state, record.reason if lifecycle.is_over(record.state) else None
    if not record.supervised:  # it left in order, but before a verdict
        return State.PREEMPTED, record.reason
    who = f"its supervisor (pid {record.pid} on {record.host})"
    return State.PREEMPTED, f"{who} died while the job was {record.state.value}; the same command carries on"


def _rate(record: JobRecord, step: int, now: float) -> float | None:
    first_time, first_step = record.attempt_first_time, record.attempt_first_step
    if record.rate is not None or first_time is None or first_step is None:
        return record.rate
    return (step - first_step) / (now - first_time) if step > first_step and now > first_time else None


def _progress(status: Status) -> str:
    record = status.record
    step = f"step {status.step}" + (f" of {status.total_steps}" if status.total_steps else "")
    parts = [step]
    if record.attempt is not None:
        parts.append(f"attempt {record.attempt}")
    if record.world_size is not None:
        parts.append(_count(record.world_size, "rank"))
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
    text = f"rank {rank}: {shares[rank]:.0%} of its time is its own, the others' {straggler.others(shares, rank):.0%}"
    return [("slow rank", f"{text}: they wait for it")]


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
        f"{_count(record.lost_steps, 'step')} done again",
        _count(record.restarts, "restart"),
        _count(record.preemptions, "preemption"),
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _left(allowed: int, used: int) -> int:
    return max(0, allowed - used)


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinities."""
    return value if value is not None and math.isfinite(value) else None
