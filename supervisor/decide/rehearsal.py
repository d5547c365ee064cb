"""What can be rehearsed on a live job, when it must not be, and how a rehearsal went: from the journal's facts to a report.

A rehearsal is a real fault. So it is refused where the answer is known beforehand to be bad: where the job would give up
over it (its budget of failures is spent, which is asked of the very rules that would decide), and where nothing was saved yet and
everything would be done again.

How it went is told by the facts that the supervisor journals anyway, from the moment of the fault on; nothing in the supervisor
knows of rehearsals, so nothing can behave otherwise in one. Three courses:

- most faults end the attempt: it recovered when a later attempt has completed its first step and does not fail right after it;
- a full disk ends nothing: it recovered when, after a drain has failed and the space is there again, a checkpoint is committed;
- a notice ends the run: it went well when the supervisor has left with code 75.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final

from supervisor.model import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRejected,
    Decided,
    Fact,
    Failure,
    FailureKind,
    FirstStep,
    Resumed,
    RunEnded,
    StopRequested,
)

SAVED: Final = 75  # exit code: state saved, run me again
_MINUTE: Final = 60.0


class Kind(enum.StrEnum):
    """What can be rehearsed."""

    KILL_RANK = "kill-rank"
    KILL_TORCHRUN = "kill-torchrun"
    STOP_RANK = "stop-rank"
    STICK_GIL = "stick-gil"
    EXCEPTION = "exception"
    OOM = "oom"
    FULL_DISK = "full-disk"
    CORRUPT_CHECKPOINT = "corrupt-checkpoint"
    NOTICE = "notice"


@dataclass(frozen=True, kw_only=True)
class About:
    """One kind. ``patience``: seconds for all of it unless the user says otherwise."""

    what: str
    taken_for: FailureKind | None = None  # what the supervisor must find
    of_rank: bool = True  # it strikes one rank
    inside: bool = False  # … from inside, by its background thread
    patience: float = 10 * _MINUTE


ABOUT: Final[dict[Kind, About]] = {
    Kind.KILL_RANK: About(
        what="SIGKILL to one rank, as the kernel's out-of-memory killer sends it", taken_for=FailureKind.CRASH
    ),
    Kind.KILL_TORCHRUN: About(
        what="SIGKILL to torchrun", taken_for=FailureKind.LAUNCHER, of_rank=False
    ),
    Kind.STOP_RANK: About(
        what="SIGSTOP to one rank: a hang; it goes on (SIGCONT) if that is not found in time",
        taken_for=FailureKind.HANG,
        patience=35 * _MINUTE,
    ),
    Kind.STICK_GIL: About(
        what="C code in one rank that holds the interpreter's lock and does not return: a hang; it returns when the "
        "rehearsal is over",
        taken_for=FailureKind.HANG,
        inside=True,
        patience=35 * _MINUTE,
    ),
    Kind.EXCEPTION: About(
        what="an exception (RehearsedError) out of the training code of one rank, wherever it is",
        taken_for=FailureKind.EXCEPTION,
        inside=True,
    ),
    Kind.OOM: About(
        what="torch.OutOfMemoryError out of the training code of one rank; no memory is really taken (what the kernel does "
        "to a host that is out of memory is kill-rank)",
        taken_for=FailureKind.CUDA_OOM,
        inside=True,
    ),
    Kind.FULL_DISK: About(
        what="fill the file system of the checkpoints until a checkpoint has failed, then give the space back",
        of_rank=False,
        patience=65 * _MINUTE,
    ),
    Kind.CORRUPT_CHECKPOINT: About(
        what="flip one bit of the newest checkpoint, drop the snapshots in memory and kill one rank: the job must notice and "
        "go on from the checkpoint before; the bit is put back in the end",
        taken_for=FailureKind.CRASH,
    ),
    Kind.NOTICE: About(
        what="SIGUSR1 to the supervisor, as before a preemption: the job saves, stops and leaves with code 75; run the same "
        "command again to carry on",
        of_rank=False,
    ),
}  # fmt: skip


# --------------------------------------------------------------------------- its course


@dataclass(frozen=True, kw_only=True)
class Course:
    """A rehearsal so far: what was done, and the facts that matter since. ``struck`` in Unix seconds."""

    kind: Kind
    attempt: int
    struck: float
    rank: int | None = None
    damaged: str | None = None  # the checkpoint that is no good now
    relieved: float | None = None  # when the space was given back
    stop: StopRequested | None = None
    ended: AttemptEnded | None = None
    decided: Decided | None = None
    started: AttemptStarted | None = None
    resumed: Resumed | None = None
    first: FirstStep | None = None
    relapse: AttemptEnded | None = None  # a failure right after that
    rejected: tuple[CheckpointRejected, ...] = ()
    refused: CheckpointFailed | None = None  # the drain that found the disk full
    committed: CheckpointCommitted | None = (
        None  # … and the one that found it free; before a stop: the last one
    )
    left: RunEnded | None = None


def follow(course: Course, fact: Fact) -> Course:
    """The course with one more fact of the journal."""
    if fact.time < course.struck:
        return course
    match fact:
        case StopRequested():
            return replace(course, stop=fact)
        case AttemptEnded() if course.ended is None:
            return replace(course, ended=fact)
        case AttemptEnded(failure=Failure()) if course.first is not None and course.relapse is None:
            return replace(course, relapse=fact)
        case Decided() if course.decided is None:
            return replace(course, decided=fact)
        case AttemptStarted(attempt=attempt) if attempt > course.attempt:
            return replace(course, started=fact, resumed=None)
        case Resumed(attempt=attempt) if attempt > course.attempt:
            return replace(course, resumed=fact)
        case FirstStep(attempt=attempt) if attempt > course.attempt:
            return replace(course, first=fact)
        case CheckpointRejected():
            return replace(course, rejected=(*course.rejected, fact))
        case CheckpointFailed() if course.refused is None:
            return replace(course, refused=fact)
        case CheckpointCommitted(emergency=False) if _counts(course, fact):
            return replace(course, committed=fact)
        case RunEnded():
            return replace(course, left=fact)
        case _:
            return course


def _counts(course: Course, fact: CheckpointCommitted) -> bool:
    return course.kind is not Kind.FULL_DISK or (course.relieved is not None and fact.time >= course.relieved)


def is_over(course: Course) -> bool:
    """Whether nothing more is waited for."""
    if course.left is not None:
        return True
    if course.kind is Kind.FULL_DISK:
        return course.committed is not None
    return course.first is not None


# --------------------------------------------------------------------------- its report


@dataclass(frozen=True, kw_only=True)
class Report:
    """How it went. Durations in seconds, each None where it did not come to that."""

    kind: str
    rank: int | None
    attempt: int  # in which it struck
    recovered: bool
    result: str  # in plain words
    detection: float | None = None  # from the fault to the moment it was noticed
    teardown: float | None = (
        None  # from there until nothing of the attempt was left; before a stop: with saving
    )
    pause: float | None = None  # before the next attempt
    relaunch: float | None = None  # from the next attempt's start to its first completed step
    restore: float | None = None  # of that, reading the state back
    total: float | None = None  # from the fault until all was well
    standby: bool | None = None  # whether the next attempt had been launched ahead
    steps_lost: int | None = None  # None: not known, the script has no Session
    resumed_step: int | None = None
    resumed_from: str | None = None  # ``ram`` or the checkpoint's path
    failure: str | None = None  # the kind that it was taken for
    as_expected: bool | None = None  # whether that is what it was
    reason: str | None = None
    verdict: str | None = None
    rejected: tuple[str, ...] = ()  # damaged checkpoints that were found and skipped
    exit_code: int | None = None  # of ``everstep run``, if it has ended


def report(course: Course, trouble: str | None = None) -> Report:
    """The report on a course that is over, or was broken off for ``trouble``."""
    if course.kind is Kind.FULL_DISK:
        return _report_on_disk(course, trouble)
    if course.kind is Kind.NOTICE:
        return _report_on_notice(course, trouble)
    ended, first, started, resumed = course.ended, course.first, course.started, course.resumed
    failure = ended.failure if ended is not None else None
    noticed = ended.noticed if ended is not None else None
    why_not = trouble or _why_not(course)
    return Report(
        kind=course.kind.value,
        rank=course.rank,
        attempt=course.attempt,
        recovered=why_not is None,
        result=why_not or f"recovered: attempt {first.attempt if first else 0} goes on",
        detection=_between(course.struck, noticed),
        teardown=_between(noticed, ended.time if ended is not None else None),
        pause=course.decided.delay if course.decided is not None else None,
        relaunch=_between(started.time if started is not None else None, first.time if first else None),
        restore=first.restore_seconds if first is not None and resumed is not None else None,
        total=_between(course.struck, first.time if first is not None else None),
        standby=started.standby if started is not None else None,
        steps_lost=_lost(ended, resumed.step if resumed is not None else None),
        resumed_step=resumed.step if resumed is not None else None,
        resumed_from=_source(resumed),
        failure=failure.kind.value if failure is not None else None,
        as_expected=None if failure is None else failure.kind is ABOUT[course.kind].taken_for,
        reason=failure.reason if failure is not None else None,
        verdict=course.decided.reason if course.decided is not None else None,
        rejected=tuple(fact.path for fact in course.rejected),
        exit_code=course.left.exit_code if course.left is not None else None,
    )


def _why_not(course: Course) -> str | None:
    """Why it counts as not recovered although it is over; None: it recovered."""
    if course.first is None:
        left = course.left
        return (
            f"the job has ended instead: {left.reason}" if left is not None else "it did not come to a step"
        )
    if course.relapse is not None and course.relapse.failure is not None:
        return f"it came back, and then {course.relapse.failure.reason}"
    if course.damaged is None or course.damaged in {fact.path for fact in course.rejected}:
        return None
    resumed = course.resumed
    if resumed is not None and resumed.path != course.damaged and resumed.path is not None:
        return f"the job went on from {resumed.path}, which was saved meanwhile: the damage was not met, try again"
    return f"the damage of {course.damaged} was not noticed"


def _report_on_disk(course: Course, trouble: str | None) -> Report:
    ended, refused, committed = course.ended, course.refused, course.committed
    why_not = trouble
    if why_not is None and committed is None:
        why_not = f"the job has ended meanwhile: {course.left.reason if course.left is not None else 'nobody knows why'}"
    if why_not is None and ended is not None:
        why_not = f"the training did not go on: {ended.failure.reason if ended.failure else 'it was stopped'}"
    step = committed.step if committed is not None else 0
    return Report(
        kind=course.kind.value,
        rank=None,
        attempt=course.attempt,
        recovered=why_not is None,
        result=why_not or f"recovered: training went on, and step {step} is durable",
        detection=_between(course.struck, refused.time if refused is not None else None),
        relaunch=None,
        total=_between(course.relieved, committed.time if committed is not None else None),
        steps_lost=0 if ended is None else None,
        reason=refused.reason if refused is not None else None,
        exit_code=course.left.exit_code if course.left is not None else None,
    )


def _report_on_notice(course: Course, trouble: str | None) -> Report:
    stop, left, ended = course.stop, course.left, course.ended
    why_not = trouble
    if why_not is None and (left is None or left.exit_code != SAVED):
        why_not = "the job did not stop in order" + (f": {left.reason}" if left is not None else "")
    return Report(
        kind=course.kind.value,
        rank=None,
        attempt=course.attempt,
        recovered=why_not is None,
        result=why_not or "stopped in order: run the same command again to carry on",
        detection=_between(course.struck, stop.time if stop is not None else None),
        teardown=_between(stop.time if stop is not None else None, left.time if left is not None else None),
        total=_between(course.struck, left.time if left is not None else None),
        steps_lost=_lost(ended, course.committed.step if course.committed is not None else None),
        verdict=course.decided.reason if course.decided is not None else None,
        exit_code=left.exit_code if left is not None else None,
    )


def stage(course: Course) -> str:
    """How far it has come, for one that is broken off."""
    if course.kind is Kind.FULL_DISK:
        if course.refused is None:
            return "no checkpoint was due, or one still fitted (see --checkpoint-every)"
        return "a checkpoint has failed, and none was committed since"
    if course.kind is Kind.NOTICE:
        return "the stop was not noticed" if course.stop is None else "the job is still stopping"
    if course.ended is None:
        return "the fault was not noticed, and the attempt goes on"
    if course.started is None:
        return "the attempt was ended, and no other has begun"
    return f"attempt {course.started.attempt} was begun and has completed no step yet"


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


def _lost(ended: AttemptEnded | None, step: int | None) -> int | None:
    if ended is None or step is None:
        return None
    return max(0, (ended.step or 0) - step)


def _source(resumed: Resumed | None) -> str | None:
    if resumed is None or resumed.tier is None:
        return None
    return resumed.tier.value if resumed.tier.value == "ram" else resumed.path
