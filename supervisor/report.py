"""All that a report shows of a job, as one plain document: ``everstep report`` puts it into a page, ``--json`` prints it.

The picture is complete, however long the job: columns of time and of steps are fixed in number, what falls into one column is
thinned so that the drawing stays the same (``decide/thinning.py``), and where something is left out the document says so.
Times are Unix seconds, durations seconds, sizes bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from supervisor.about import version
from supervisor.decide.chronicle import Chronicle, Course, Run, Stored, Values, finite
from supervisor.decide.ribbon import ACTIVITIES
from supervisor.decide.thinning import m4
from supervisor.edge.jobdir import JobDirectory
from supervisor.edge.journal import OutOfOrderError, Reader
from supervisor.errors import JobError, ProtocolError
from supervisor.record import JobRecord
from supervisor.replay import MOST_PROBLEMS
from supervisor.status import Status, Watch
from supervisor.status_views import to_json

FORMAT: Final = 1
COLUMNS: Final = 700  # of the picture of a metric
WAY_POINTS: Final = 4000  # of all attempts together
MOST_METRICS: Final = 24
MOST_EVIDENCE: Final = 3 << 20  # characters of evidence in one document, newest failures first
MOST_TEXT: Final = 12_000  # … of one stack or traceback
MOST_UNFINITE: Final = 200


class _Told:
    """The journal, folded into the chronicle: all of it, once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._begin()

    def _begin(self) -> None:
        self.chronicle = Chronicle()
        self.problems: tuple[str, ...] = ()
        self.facts = 0
        self._reader = Reader(self._directory, self._problem)

    @property
    def record(self) -> JobRecord:
        return self.chronicle.record

    def advance(self) -> None:
        if not self._reader.fits():
            self._begin()
        try:
            self._read_on()
        except OutOfOrderError:
            self._begin()
            self._read_on()

    def _read_on(self) -> None:
        for fact in self._reader.facts():
            self.facts += 1
            try:
                self.chronicle.add(fact)
            except ProtocolError as error:
                self._problem(str(error))

    def _problem(self, problem: str) -> None:
        if len(self.problems) < MOST_PROBLEMS:
            self.problems += (problem,)


class Reporter:
    """Looks at one job again and again, reading of its journal only what is new."""

    def __init__(self, job_dir: Path) -> None:
        self._job = JobDirectory(job_dir)
        self._told = _Told(self._job.journal)
        self._watch = Watch(job_dir, self._told)

    def status(self, now: float) -> Status:
        """How the job stands. Raises JobError when there is none, or nothing of its journal can be read."""
        found = self._watch.look(now)
        if found.problems and found.record.epoch == 0:
            raise JobError(found.problems[0])
        return found

    @property
    def facts(self) -> int:
        """How many were read so far: another number, another story."""
        return self._told.facts

    def document(self, now: float) -> dict[str, Any]:
        """The whole story. Raises JobError as ``status`` does."""
        return document(self.status(now), self._told.chronicle, self._job)


def document(status: Status, chronicle: Chronicle, job: JobDirectory) -> dict[str, Any]:
    """The story of a job, as JSON has it."""
    over = not status.alive
    ribbon, sheets = chronicle.sheets(None if over else status.now, status.step)
    courses = chronicle.courses
    if over and courses and courses[-1].outcome == "running":
        courses[-1].outcome = "cut off"  # a later supervisor's first fact would say so too
    evidence = dict(_evidence(job, courses))
    low, high = _extent(chronicle.metrics)
    metrics = sorted(chronicle.metrics.items(), key=lambda item: (item[0] != "loss", item[0]))
    plain = {
        "format": FORMAT,
        "version": version(),
        "made": status.now,
        "name": status.path.name,
        "status": to_json(status),
        "activities": [activity.value for activity in ACTIVITIES],
        "ribbon": {
            "start": ribbon.start,
            "width": ribbon.width,
            "columns": [[_short(seconds) for seconds in row] for row in ribbon.rows],
        },
        "before": [_short(seconds) for seconds in sheets[0]] if sheets else [],
        "attempts": [
            _attempt(course, sheet, evidence.get(course.number), budget)
            for course, sheet, budget in zip(courses, sheets[1:], _budgets(courses), strict=True)
        ],
        "runs": [_run(run) for run in chronicle.runs],
        "metrics": [_metric(name, values, low, high) for name, values in metrics[:MOST_METRICS]],
        "metrics_left_out": [name for name, _ in metrics[MOST_METRICS:]],
        "checkpoints": [_checkpoint(stored) for stored in chronicle.checkpoints],
        "checkpoints_made": chronicle.checkpoints_made,
        "checkpoint_failures": [asdict(fact) for fact in chronicle.checkpoint_failures],
        "snapshots": {"count": chronicle.snapshots, "stall": _short(chronicle.snapshot_stall)},
    }
    return _json_safe(plain)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- attempts


def _attempt(
    course: Course, sheet: Sequence[float], evidence: dict[str, Any] | None, points: int
) -> dict[str, Any]:
    stride = max(1, math.ceil(len(course.times) / max(2, points)))
    way = list(range(0, len(course.times), stride))
    if course.times and way[-1] != len(course.times) - 1:
        way.append(len(course.times) - 1)
    resumed, verdict = course.resumed, course.verdict
    return {
        "attempt": course.number,
        "host": course.host,
        "began": course.began,
        "ended": course.ended,
        "standby": course.standby,
        "world_size": course.world_size,
        "resumed": None
        if resumed is None
        else {"step": resumed.step, "tier": resumed.tier.value if resumed.tier else None},
        "first_time": course.first_time,
        "first_step": course.first_step,
        "step": course.step,
        "kept": course.kept,
        "lost": course.lost,
        "outcome": course.outcome,
        "stop": course.stop,
        "verdict": None if verdict is None else {"action": verdict.action.value, "reason": verdict.reason},
        "failure": None if course.failure is None else asdict(course.failure),
        "evidence": evidence,
        "seconds": [_short(seconds) for seconds in sheet],
        "way": [[_short(course.times[index]), course.steps[index]] for index in way],
    }


def _budgets(courses: Sequence[Course]) -> list[int]:
    """How many points of each attempt's way are shown: in proportion to how many are known."""
    known = sum(len(course.times) for course in courses)
    scale = min(1.0, WAY_POINTS / known) if known else 1.0
    return [round(len(course.times) * scale) for course in courses]


def _run(run: Run) -> dict[str, Any]:
    return {**asdict(run.fact), "ended": run.ended, "exit_code": run.exit_code, "reason": run.reason}


# --------------------------------------------------------------------------- evidence


def _evidence(job: JobDirectory, courses: Sequence[Course]) -> Iterator[tuple[int, dict[str, Any]]]:
    """What ``failure.json`` adds to the one line: by attempt, newest first, until there is enough."""
    left = MOST_EVIDENCE
    for course in reversed(courses):
        if course.failure is None:
            continue
        file = job.attempt(course.number) / "failure.json"
        if left <= 0:
            yield course.number, {"path": str(file), "left_out": True}
            continue
        found = _read_evidence(file)
        left -= len(json.dumps(found))
        yield course.number, found


def _read_evidence(file: Path) -> dict[str, Any]:
    try:
        plain = json.loads(file.read_text(errors="replace"))["evidence"]
        ends = [
            {
                "rank": end["rank"],
                "pid": end["pid"],
                "step": end["step"],
                "exit_code": end["exit_code"],
                "signal": end["signal"],
                "raised": _cut(end["raised"]["traceback"]) if end["raised"] else None,
                "last_lines": [_cut(line) for line in end["last_lines"][-20:]],
            }
            for end in plain["ends"]
        ]
        return {
            "path": str(file),
            "ends": ends,
            "launcher_lines": [_cut(line) for line in plain["launcher_lines"][-20:]],
            "hang": plain["hang"],
            "stacks": {rank: _cut(text) for rank, text in plain["stacks"].items()},
        }
    except OSError as error:
        return {"path": str(file), "problem": error.strerror}
    except (ValueError, KeyError, TypeError):
        return {"path": str(file), "problem": "not a file of this version"}


def _cut(text: str) -> str:
    if len(text) <= MOST_TEXT:
        return text
    return f"{text[:MOST_TEXT]}\n… {len(text) - MOST_TEXT} characters more"


# --------------------------------------------------------------------------- metrics, checkpoints


def _extent(metrics: dict[str, Values]) -> tuple[int, int]:
    ends = [(min(values.steps), max(values.steps)) for values in metrics.values() if values.steps]
    return min((low for low, _ in ends), default=0), max((high for _, high in ends), default=0)


def _metric(name: str, values: Values, low: float, high: float) -> dict[str, Any]:
    """The points to draw, one stretch for each attempt: ``[attempt, steps, values]``."""
    stretches: list[list[Any]] = []
    whole = finite(values.values)
    begin = 0
    for end in range(1, len(whole) + 1):
        attempt = values.attempts[whole[begin]]
        if end < len(whole) and values.attempts[whole[end]] == attempt:
            continue
        part = whole[begin:end]
        xs, ys = [values.steps[index] for index in part], [values.values[index] for index in part]
        kept = m4(xs, ys, low, high, COLUMNS)
        stretches.append(
            [attempt, [xs[index] for index in kept], [float(f"{ys[index]:.6g}") for index in kept]]
        )
        begin = end
    numbers = set(whole)
    not_finite = [values.steps[index] for index in range(len(values.values)) if index not in numbers]
    return {
        "name": name,
        "count": len(values.values),
        "shown": sum(len(stretch[1]) for stretch in stretches),
        "stretches": stretches,
        "not_finite": not_finite[-MOST_UNFINITE:],
        "not_finite_count": len(not_finite),
    }


def _checkpoint(stored: Stored) -> dict[str, Any]:
    fact = stored.fact
    state = stored.state
    if state in ("kept", "verified") and fact.path.startswith("/") and not Path(fact.path).is_dir():
        state = "gone"
    return {
        "step": fact.step,
        "attempt": fact.attempt,
        "time": fact.time,
        "seconds": _short(fact.seconds),
        "bytes": fact.bytes,
        "path": fact.path,
        "metrics": fact.metrics,
        "emergency": fact.emergency,
        "state": state,
        "problem": stored.problem,
    }


# --------------------------------------------------------------------------- numbers


def _short(seconds: float) -> float:
    return round(seconds, 3)


def _json_safe(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return value
