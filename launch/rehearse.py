"""``everstep rehearse KIND``: a real fault on a live job, and the report of how it came back."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from supervisor.errors import UsageError

if TYPE_CHECKING:
    from launch.strikes import Plan, Scene, Struck
    from supervisor.decide.rehearsal import Course, Kind, Report
    from supervisor.edge.journal import Reader
    from supervisor.model import Fact

LOOK: Final = 0.01  # seconds between two looks at the journal
LOOK_FOR_SUPERVISOR: Final = 1.0
STEADY: Final = 1.0  # seconds for which it must go on to count as recovered
DECLINED: Final = 130
TEXT = """\
Inflicts a real fault on a job that is running on this host, watches it recover, and reports how long what took and how
many steps were lost. The job's state is never lost for good; what was done since its last snapshot is done again.
"""


def add_parser(commands: Any, add_job: Callable[[argparse.ArgumentParser], None]) -> Any:
    """The words of the command."""
    parser = commands.add_parser(
        "rehearse", help="inflict a fault on a live job and report how it recovers", description=TEXT,
        epilog="exit codes: 0 recovered, 1 did not, 64 refused or wrong usage",
    )  # fmt: skip
    parser.add_argument("kind", nargs="?", metavar="KIND", help="which fault; --list explains them")
    parser.add_argument("--list", action="store_true", help="what can be rehearsed")
    parser.add_argument(
        "--rank", type=int, metavar="N", help="the rank that it strikes (default: the last on this host)"
    )
    parser.add_argument(
        "--timeout", metavar="TIME", help="how long to wait for the recovery (default: 10m; --list)"
    )
    parser.add_argument(
        "--yes", action="store_true", help="do not ask (without a terminal nobody can be asked)"
    )
    add_job(parser)
    return parser


def answer(given: Mapping[str, Any], find_job: Callable[[], Path]) -> int:
    """Carry it out; 0 when the job recovered, 1 when it did not. Raises UsageError where it is refused."""
    from supervisor.decide.rehearsal import ABOUT, Kind

    if given["list"]:
        print(_listed(json=given["json"]))
        return 0
    kinds = ", ".join(kind.value for kind in Kind)
    if given["kind"] is None:
        raise UsageError(f"rehearse what? one of {kinds} (--list explains them)")
    if given["kind"] not in set(Kind):
        raise UsageError(f"{given['kind']!r} cannot be rehearsed; allowed: {kinds}")
    kind = Kind(given["kind"])
    patience = ABOUT[kind].patience if given["timeout"] is None else _seconds(given["timeout"])
    return _rehearse(kind, find_job(), given["rank"], patience, agreed=given["yes"], json=given["json"])


def _seconds(text: str) -> float:
    from supervisor.errors import ConfigError
    from supervisor.intervals import parse_duration

    try:
        return parse_duration(text)
    except (ConfigError, ValueError) as error:
        raise UsageError(f"--timeout: {error}") from None


def _listed(*, json: bool) -> str:
    from supervisor.decide.rehearsal import ABOUT

    if json:
        return dumps(
            {kind.value: {"what": about.what, "timeout": about.patience} for kind, about in ABOUT.items()}
        )
    return "\n".join(
        f"{kind.value:<19} {about.what} ({about.patience / 60:g}m)" for kind, about in ABOUT.items()
    )


def _rehearse(kind: Kind, job: Path, rank: int | None, patience: float, *, agreed: bool, json: bool) -> int:
    from launch import strikes
    from supervisor.decide import rehearsal
    from supervisor.edge import clock
    from supervisor.edge.journal import Reader

    for signum in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: undo what was done
        signal.signal(signum, signal.default_int_handler)
    scene = _scene(kind, job, rank, agreed=agreed)
    with _alone(job):
        if (mended := strikes.mend(job)) is not None:
            _say(f"{mended} was still damaged by an earlier rehearsal: mended")
        plan = strikes.plan(kind, scene)
        if not agreed and not _may(kind, scene, plan):
            return DECLINED
        reader = Reader.from_now_on(job / "journal")
        try:
            with plan.strike() as struck:
                _say(f"done: {plan.words}")
                course = rehearsal.Course(
                    kind=kind,
                    attempt=scene.attempt,
                    rank=scene.rank if rehearsal.ABOUT[kind].of_rank else None,
                    struck=struck.time,
                    damaged=struck.damaged,
                )
                course, trouble = _watch(course, job, reader, struck, clock.monotonic() + patience)
        except KeyboardInterrupt:
            _say("broken off: what was done is undone as far as it can be, the job goes its way")
            return DECLINED
    report = rehearsal.report(course, trouble)
    print(dumps(asdict(report), indent=2) if json else _text(report))
    return 0 if report.recovered else 1


@contextlib.contextmanager
def _alone(job: Path) -> Iterator[None]:
    """One rehearsal of a job at a time: two faults would be taken for one. Raises UsageError."""
    with open(job / "job.json", "rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{job}: another rehearsal is under way") from None
        except OSError:
            _say(f"{job} cannot be locked: take care that nobody else rehearses")
        yield


def _scene(kind: Kind, job: Path, rank: int | None, *, agreed: bool) -> Scene:
    from launch import here
    from launch.strikes import Scene
    from supervisor.decide import rehearsable
    from supervisor.edge import clock
    from supervisor.edge.jobdir import JobDirectory
    from supervisor.status import read_status

    status = read_status(job, clock.now())
    file, record = JobDirectory(job).read(), status.record
    seats = None
    if file is not None and here.is_of_several(file):
        seats = here.seats(file, status.path, record.attempt or 0)
    why_not = rehearsable.refusal(
        kind, record, alive=status.alive, host=socket.gethostname(), rank=rank, now=status.now, here=seats
    )
    if why_not is not None:
        raise UsageError(f"{job}: {why_not}")
    assert file is not None
    if rank is None:
        rank = max(seats) if seats else (record.world_size or 1) - 1
    return Scene(
        job=status.path,
        runtime=seats[rank].runtime if seats else Path(file.runtime),
        local_rank=seats[rank].local_rank if seats else None,
        run_id=file.run_id,
        record=record,
        attempt=record.attempt or 0,
        rank=rank,
        agreed=agreed,
    )


def _may(kind: Kind, scene: Scene, plan: Plan) -> bool:
    """Say what will be done, and ask. Raises UsageError without a terminal."""
    from supervisor.decide import rehearsable
    from supervisor.edge import clock

    if not sys.stdin.isatty():
        raise UsageError(
            f"this would be done: {plan.words}; without a terminal nobody can be asked: --yes does it"
        )
    _say(f"this will be done: {plan.words}")
    verdict = rehearsable.foreseen(kind, scene.record, clock.now())
    if verdict is not None:
        _say(f"the answer will be: {verdict.reason}")
    if scene.record.resumed_step is None:
        _say("the script has no Session: it finds its own way back, or begins anew")
    print("everstep: do it? [y/N] ", end="", file=sys.stderr, flush=True)  # standard output is the report's
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# --------------------------------------------------------------------------- watching


def _watch(
    course: Course, job: Path, reader: Reader, struck: Struck, deadline: float
) -> tuple[Course, str | None]:
    """Follow the journal until it is over; the course, and what went wrong, if anything did."""
    from supervisor.decide import rehearsal
    from supervisor.edge import clock
    from supervisor.edge.live import is_held

    look_again = clock.monotonic() + LOOK_FOR_SUPERVISOR
    held, steady = True, 0.0
    while True:
        for fact in reader.facts():
            if (followed := rehearsal.follow(course, fact)) is not course:
                course = followed
                _tell(fact, course.struck)
        now = clock.monotonic()
        if rehearsal.is_over(course):
            steady = steady or now + STEADY
            if now >= steady or course.left is not None or course.relapse is not None:
                return course, None
        if course.kind is rehearsal.Kind.FULL_DISK and course.refused and course.relieved is None:
            struck.relieve()
            course = replace(course, relieved=clock.now())
        if not held:  # and nothing that it wrote last was left to read
            return course, "its supervisor is gone without a word: run the same command again"
        if now > deadline and not steady:
            return course, f"not within the time given (--timeout): {rehearsal.stage(course)}"
        if now > look_again:
            held, look_again = is_held(job / "lock"), now + LOOK_FOR_SUPERVISOR
        clock.pause(LOOK)


def _tell(fact: Fact, since: float) -> None:
    from supervisor import model

    match fact:
        case model.AttemptEnded(failure=failure):
            words = failure.reason if failure is not None else "the attempt has ended"
        case model.AttemptStarted(attempt=attempt, standby=standby):
            words = f"attempt {attempt} begins ({'the standby' if standby else 'a cold start'})"
        case model.Resumed(step=step, path=path):
            words = f"it resumes at step {step}" + (f" from {path}" if path else "")
        case model.FirstStep(step=step):
            words = f"step {step} is complete"
        case model.CheckpointRejected(path=path, reason=reason):
            words = f"{path} is skipped: {reason}"
        case model.CheckpointFailed(step=step, reason=reason):
            words = f"the checkpoint of step {step} failed: {reason}"
        case model.CheckpointCommitted(step=step):
            words = f"the checkpoint of step {step} is committed"
        case model.StopRequested(source=source):
            words = f"{source} has arrived"
        case model.Decided(reason=reason) | model.RunEnded(reason=reason):
            words = reason
        case _:
            return
    _say(f"{fact.time - since:7.3f} s  {words}")


def _say(line: str) -> None:
    print(f"everstep: {line}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- the report


def _text(report: Report) -> str:
    rows = [
        ("fault", report.kind + (f" in rank {report.rank}" if report.rank is not None else "") + f", attempt {report.attempt}"),
        ("result", report.result),
        ("detection", _span(report.detection, "from the fault until it was noticed")),
        ("teardown", _span(report.teardown, _teardown(report))),
        ("pause", _span(report.pause or None, "before the next attempt")),
        ("relaunch", _span(report.relaunch, "to the first step, " + ("from the standby" if report.standby else "a cold start"))),
        ("restore", _span(report.restore, "of that, reading the state back")),
        ("total", _span(report.total, _total(report))),
        ("steps lost", _lost(report)),
        ("taken for", _taken_for(report)),
        ("verdict", report.verdict or ""),
        *(("skipped", path) for path in report.rejected),
    ]  # fmt: skip
    return "\n".join(f"{name:<12} {text}" for name, text in rows if text)


def _span(seconds: float | None, remark: str) -> str:
    return "" if seconds is None else f"{f'{seconds:.3f} s':<12} {remark}"


def _teardown(report: Report) -> str:
    return (
        "until nothing of it was left"
        if report.kind != "notice"
        else "until the state was saved and all had left"
    )


def _total(report: Report) -> str:
    if report.kind == "full-disk":
        return "from the space given back to the next checkpoint"
    return "from the fault to the end" if report.kind == "notice" else "from the fault to the next first step"


def _lost(report: Report) -> str:
    if report.steps_lost is None:
        return "not known" if report.resumed_step is None and report.relaunch is not None else ""
    if report.resumed_step is None:
        return str(report.steps_lost)
    source = {None: "the beginning", "ram": "memory"}.get(report.resumed_from, report.resumed_from)
    return f"{report.steps_lost:<12} resumed at step {report.resumed_step} from {source}"


def _taken_for(report: Report) -> str:
    if report.failure is None:
        return report.reason or ""
    reason = "" if report.verdict else f": {report.reason}"  # a verdict says it too
    return report.failure + ("" if report.as_expected else ", which it was not") + reason
