"""How a job stands, for people and for programs: its journal, and what its live workers' control pages say beyond it.

The journal alone describes a job that is over. While a supervisor holds the job's lock on this host, steps, loss and the
newest snapshot come from the control pages, which are never more than a step old; what only the supervisor knows, and what is
looked at from another host, comes from ``live.json``, some seconds old (``edge/live_file.py``). A journal that ends in the middle of
the work while nobody holds the lock tells of a supervisor that was killed: such a job can be resumed, so it is shown
as preempted.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from supervisor.decide import goodput, lifecycle, straggler
from supervisor.edge import arenas, live_file
from supervisor.edge.arenas import Arenas
from supervisor.edge.jobdir import JobDirectory, JobFile
from supervisor.edge.live import Live, is_held, read_live
from supervisor.errors import JobError
from supervisor.model import State
from supervisor.record import JobRecord
from supervisor.replay import Replay
from supervisor.timesheet import Timesheet

STALE: Final = 30.0  # seconds by which the journal may be ahead of the live file: each is written every ten


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
    nodes: tuple[str, ...] = ()  # the names of the attempt's nodes, by rank, where there are several
    seen_from: str | None = None  # what shows more than the journal: "control pages" or "live.json"
    age: float | None = None  # … and how many seconds old that is
    arenas: Arenas | None = None  # this node's
    run_id: str | None = None
    problems: tuple[str, ...] = ()  # lines of the journal that could not be used


class Folded(Protocol):
    """A journal folded as far as it has been read."""

    @property
    def record(self) -> JobRecord:
        """The job."""
        ...

    @property
    def problems(self) -> tuple[str, ...]:
        """Lines that could not be used."""
        ...

    def advance(self) -> None:
        """Fold what is new. Raises JobError when it cannot be read."""
        ...


class Watch:
    """Looks at one job again and again, and reads of its journal only what is new.

    ``folded``: its journal, where somebody folds it anyway.
    """

    def __init__(self, job_dir: Path, folded: Folded | None = None) -> None:
        self._given = job_dir
        self._job = JobDirectory(job_dir)
        self._folded = folded or Replay(self._job.journal)
        self._seen: tuple[float, float] | None = (
            None  # of the live file: when it was written, and that it was new then
        )

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
        if alive and started and file is not None:
            told = self._told(file, record, now)
            if record.host == socket.gethostname():
                live = read_live(Path(file.runtime), record.attempt or 0)
            live = told if live is None else of_all_ranks(live, told, record)
        return describe(
            job.path,
            record,
            now,
            alive=alive,
            live=live,
            arenas=arenas.measure(Path(file.runtime), record.pid)
            if live and live.age is None and file is not None
            else None,
            run_id=file.run_id if file is not None else None,
            problems=self._folded.problems,
        )

    def _told(self, file: JobFile, record: JobRecord, now: float) -> Live | None:
        """What the live file says, if it is of the attempt that runs and not left from earlier."""
        if (
            record.state not in (State.RUNNING, State.STOPPING)
            or (found := live_file.read(self._job.path)) is None
        ):
            return None
        told, modified = found
        if (told.run_id, told.epoch, told.attempt) != (file.run_id, file.epoch, record.attempt):
            return None
        if (record.last_time or 0) - told.written > STALE:
            return None
        if self._seen is None:
            self._seen = told.written, min(modified, now)
        elif self._seen[0] != told.written:
            self._seen = told.written, now
        return Live(
            step=told.step,
            total_steps=told.total_steps,
            saved_step=told.saved_step,
            saved_time=told.saved_time,
            loss=told.loss,
            own_shares=straggler.from_percents(told.own_shares),
            ranks=told.world_size,
            nodes=told.nodes,
            age=max(0.0, now - self._seen[1]),
        )


def of_all_ranks(live: Live, told: Live | None, record: JobRecord) -> Live:
    """The control pages of one node, with what the supervisor knows of the ranks of all: those pages do not say which ranks they are of."""
    if record.world_size is None or live.ranks >= record.world_size:
        return live
    if told is None:
        return replace(live, own_shares={})
    return replace(live, own_shares=told.own_shares, ranks=told.ranks, nodes=told.nodes)


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
        nodes=live.nodes if live else (),
        seen_from=None if live is None else "control pages" if live.age is None else live_file.NAME,
        age=live.age if live else None,
        arenas=arenas,
        run_id=run_id,
        problems=problems,
    )


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
