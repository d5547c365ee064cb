"""A job's journal told attempt by attempt: when each ran, from where to where, why it ended, and what of it still counts.

``lifecycle`` folds the same facts into what holds now; here is kept what was. It grows with attempts, checkpoints and logged
values, not with facts. Whatever the record knows (steps, seconds, verdicts) is taken from it and not worked out a second
time, so the two cannot disagree.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from supervisor.decide import goodput, lifecycle
from supervisor.decide.ribbon import Cells, Change, Ribbon
from supervisor.model import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointsPruned,
    Decided,
    Fact,
    Failure,
    FirstStep,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
    SnapshotCompleted,
    StopRequested,
    Tier,
    WorkersReady,
)
from supervisor.record import JobRecord
from supervisor.timesheet import Activity

MOST_POINTS: Final = 256  # of an attempt's way; then every second one goes
MOST_GONE: Final = 1000  # checkpoints that are no more, of which each is told


@dataclass(kw_only=True)
class Run:
    """One supervisor's time in charge."""

    fact: RunStarted
    ended: float | None = None
    exit_code: int | None = None
    reason: str | None = None


@dataclass(kw_only=True)
class Course:
    """One attempt. Times are Unix seconds; steps are completed ones."""

    number: int
    began: float
    host: str | None
    standby: bool
    world_size: int | None = None
    resumed: Resumed | None = None  # None: not yet, or it has no Session
    first_time: float | None = None
    first_step: int | None = None
    step: int | None = None  # its furthest
    ended: float | None = None
    failure: Failure | None = None
    outcome: str = "running"  # running, finished, stopped, failed, cut off
    stop: str | None = None  # who asked it to stop
    verdict: Decided | None = None
    kept: int | None = (
        None  # a later attempt resumed here: what it did beyond was lost. None: all of it counts
    )
    times: list[float] = field(default_factory=list)  # its way: completed steps at these times
    steps: list[int] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Steps of it that were done again."""
        begin = self.resumed.step if self.resumed is not None else (self.first_step or 1) - 1
        return 0 if self.kept is None or self.step is None else max(0, self.step - max(self.kept, begin))

    def went(self, time: float, step: int) -> None:
        """``step`` steps were complete at ``time``."""
        self.step = max(self.step or 0, step)
        self.times.append(time)
        self.steps.append(step)
        if len(self.times) > MOST_POINTS:
            del self.times[1:-1:2], self.steps[1:-1:2]


@dataclass(kw_only=True)
class Stored:
    """A checkpoint, and what has become of it: kept, verified, damaged, pruned, replaced."""

    fact: CheckpointCommitted
    state: str = "kept"
    problem: str | None = None


class Values:
    """All values of one logged metric, in the order in which they were logged."""

    def __init__(self) -> None:
        self.attempts, self.steps, self.values = array("q"), array("q"), array("d")

    def add(self, attempt: int, step: int, value: float) -> None:
        """The newest one."""
        if self.steps and self.steps[-1] == step and self.attempts[-1] == attempt:
            self.values[-1] = value
            return
        self.attempts.append(attempt)
        self.steps.append(step)
        self.values.append(value)


class Chronicle:
    """``add`` every fact of a journal in order; everything else is what it has told so far."""

    def __init__(self) -> None:
        self.record: JobRecord = lifecycle.NEW_JOB
        self.runs: list[Run] = []
        self.courses: list[Course] = []
        self.ribbon = Ribbon()
        self.metrics: dict[str, Values] = {}
        self.checkpoints: list[Stored] = []  # in the order of their commits
        self._there: dict[str, Stored] = {}  # by path, those that are not gone
        self.checkpoints_made = 0
        self.checkpoint_failures: list[CheckpointFailed] = []
        self.snapshots = 0
        self.snapshot_stall = 0.0  # seconds, all together
        self._sheets = Cells()  # one for the time before the first attempt, then one for each

    def add(self, fact: Fact) -> None:
        """Raises ProtocolError, and nothing changes, if it is impossible (its predecessor's line was lost)."""
        before = self.record
        after = lifecycle.apply(before, fact)
        if not self._sheets.rows:
            self._sheets.open()
        if isinstance(fact, AttemptStarted):
            self._sheets.open()
        activity = Activity.STOPPED if isinstance(fact, RunStarted) else before.activity
        if after.spent is not before.spent:
            change = Change(before, after, activity)
            self.ribbon.spend(change)
            self._sheets.spend(change)
        self.record = after
        self._tell(fact)

    def sheets(self, now: float | None = None, step: int = 0) -> tuple[Ribbon, list[list[float]]]:
        """The ribbon, and seconds by activity: before the first attempt, then for each attempt up to the next.

        ``now``: also the time since the newest fact, of a job that is alive with ``step`` completed steps.
        """
        if now is None or self.record.last_time is None or not self._sheets.rows:
            return self.ribbon, self._sheets.rows
        after = goodput.advance(self.record, now)
        if after.attempt_first_time is not None:
            after = goodput.worked(after, step)
        change = Change(self.record, after, self.record.activity)
        ribbon, sheets = self.ribbon.copy(), self._sheets.copy()
        ribbon.spend(change)
        sheets.spend(change)
        return ribbon, sheets.rows

    # ------------------------------------------------------------------ fact by fact

    def _tell(self, fact: Fact) -> None:
        course = self.courses[-1] if self.courses else None
        match fact:
            case RunStarted():
                self._cut_off(fact.time)
                self.runs.append(Run(fact=fact))
            case RunEnded() if self.runs:
                run = self.runs[-1]
                run.ended, run.exit_code, run.reason = fact.time, fact.exit_code, fact.reason
            case AttemptStarted():
                host = self.runs[-1].fact.host if self.runs else None
                self.courses.append(
                    Course(number=fact.attempt, began=fact.time, host=host, standby=fact.standby)
                )
            case SnapshotCompleted():
                self.snapshots += 1
                self.snapshot_stall += fact.seconds if fact.stalled is None else fact.stalled
            case CheckpointCommitted() | CheckpointRejected() | CheckpointsPruned():
                self._tell_checkpoint(fact)
            case CheckpointFailed():
                self.checkpoint_failures = [*self.checkpoint_failures[-99:], fact]
            case _ if course is not None:
                self._tell_course(course, fact)

    def _tell_course(self, course: Course, fact: Fact) -> None:
        match fact:
            case WorkersReady():
                course.world_size = fact.world_size
            case Resumed():
                self._resumed(course, fact)
            case FirstStep():
                course.first_time, course.first_step = fact.time, fact.step
                course.went(fact.time, fact.step)
            case Progress():
                if fact.step > (course.step or 0):
                    course.went(fact.time, fact.step)
                self._tell_metrics(course, fact.step, fact.metrics)
            case StopRequested() if course.ended is None:
                course.stop = fact.source
            case AttemptEnded():
                course.ended, course.failure = fact.time, fact.failure
                stopped = "stopped" if fact.stopped or course.stop else "cut off"
                course.outcome = "finished" if fact.finished else "failed" if fact.failure else stopped
                if fact.step is not None and course.first_time is not None and fact.step > (course.step or 0):
                    course.went(fact.noticed or fact.time, fact.step)
                self._tell_metrics(course, course.step or 0, fact.metrics)
            case Decided():
                course.verdict = fact

    def _tell_metrics(self, course: Course, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, Values()).add(course.number, step, value)

    def _cut_off(self, time: float) -> None:
        """A new supervisor is there: an attempt that had not ended died with the one before."""
        if self.courses and self.courses[-1].ended is None:
            course = self.courses[-1]
            last = course.times[-1] if course.times else course.began
            course.ended, course.outcome = min(time, max(last, course.began)), "cut off"

    def _resumed(self, course: Course, fact: Resumed) -> None:
        course.resumed = fact
        for earlier in reversed(self.courses[:-1]):
            if earlier.step is not None:
                if earlier.step > fact.step:
                    earlier.kept = min(fact.step, earlier.step if earlier.kept is None else earlier.kept)
                elif earlier.resumed is not None and earlier.resumed.step <= fact.step:
                    break  # what lies before it was settled when it resumed
        if fact.tier is Tier.CHECKPOINT and (stored := self._there.get(fact.path or "")) is not None:
            stored.state = "verified"

    # ------------------------------------------------------------------ checkpoints

    def _tell_checkpoint(self, fact: CheckpointCommitted | CheckpointRejected | CheckpointsPruned) -> None:
        match fact:
            case CheckpointCommitted():
                if (stored := self._there.get(fact.path)) is not None:
                    stored.state = "replaced"
                self._there[fact.path] = stored = Stored(fact=fact)
                self.checkpoints.append(stored)
                self.checkpoints_made += 1
            case CheckpointRejected():
                if (stored := self._there.get(fact.path)) is not None:
                    stored.state, stored.problem = "damaged", fact.reason
            case CheckpointsPruned():
                for path in [path for path, one in self._there.items() if one.fact.step in fact.steps]:
                    self._there.pop(path).state = "pruned"
        if len(self.checkpoints) > 2 * MOST_GONE + len(self._there):
            gone = [stored for stored in self.checkpoints if stored.state in ("pruned", "replaced")]
            forgotten = set(map(id, gone[:-MOST_GONE]))
            self.checkpoints = [stored for stored in self.checkpoints if id(stored) not in forgotten]


def finite(values: Sequence[float]) -> list[int]:
    """Indices of those that are numbers."""
    return [index for index, value in enumerate(values) if math.isfinite(value)]
