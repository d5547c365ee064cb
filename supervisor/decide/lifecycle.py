"""The life of a job: a transition table, and the fold of a journal into the job it tells of.

A job *is* its journal. Supervisors come and go (each may be SIGKILLed between any two lines), so no other state is
kept: whoever takes over folds the facts in order and knows what the one before knew. What follows from that:

- ``apply`` is pure and total over the table below: one lookup says which state a fact leads to, and a fact that has no
  entry is refused with an error that names fact, state and what is allowed. The same journal gives the same record.
- RunStarted is allowed everywhere, because a predecessor can have died anywhere. It opens a new epoch and drops what only
  the dead run knew: the stop it was asked for, the steps it had under way.
- The states are what a person sees. RESTARTING lasts from the verdict to the first step of the new attempt, STARTING
  from the run's start to its first step; a stop that was asked for shows as STOPPING until it is carried out. Ends
  (COMPLETED, PREEMPTED, FAILED) are reached through a verdict only, never by a fact of the world alone.
- Facts about stored state (commits, rejections, pruning) are allowed at any time: a drain outlives its attempt.

What a fact adds to the record beside its state: ``bookkeeping``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from supervisor.decide import goodput
from supervisor.decide.bookkeeping import absorb
from supervisor.errors import ProtocolError
from supervisor.model import (
    Action,
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointsPruned,
    DeadlineSet,
    Decided,
    Fact,
    FirstStep,
    NoticeReceived,
    NoticeWithdrawn,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
    SnapshotCompleted,
    StandbyReady,
    State,
    StatesCondemned,
    StopRequested,
    StopWithdrawn,
    WarningCleared,
    WarningRaised,
    WorkersReady,
)
from supervisor.record import JobRecord
from supervisor.timesheet import Activity

NEW_JOB: Final = JobRecord()

#: what happens to a job: a fact, or what a Decided fact decided
Event = type[Fact] | Action


def _stay(state: State, *events: Event) -> dict[Event, State]:
    return dict.fromkeys(events, state)


#: facts about stored state
_STORED: tuple[Event, ...] = (
    SnapshotCompleted, CheckpointCommitted, CheckpointFailed, CheckpointRejected, CheckpointsPruned, StatesCondemned,
)  # fmt: skip
#: what others intend; only a StopRequested follows from it
_NOTICED: tuple[Event, ...] = (DeadlineSet, NoticeReceived, NoticeWithdrawn)
#: what changes no state as long as there is work
_COURSE: tuple[Event, ...] = (
    StandbyReady, WorkersReady, Resumed, WarningRaised, WarningCleared, AttemptEnded, RunEnded, *_NOTICED, *_STORED,
)  # fmt: skip

_ENDS: dict[Event, State] = {
    Action.COMPLETE: State.COMPLETED,
    Action.STOP: State.PREEMPTED,
    Action.GIVE_UP: State.FAILED,
}
_LAUNCHING: dict[Event, State] = {
    RunStarted: State.STARTING,
    FirstStep: State.RUNNING,
    StopRequested: State.STOPPING,
    Action.RESTART: State.RESTARTING,
    Action.ROLL_BACK: State.RESTARTING,
    **_ENDS,
}

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.NEW: {
        RunStarted: State.STARTING,
        CheckpointsPruned: State.NEW,
    },
    State.STARTING: {
        **_LAUNCHING,
        **_stay(State.STARTING, AttemptStarted, *_COURSE),
    },
    State.RESTARTING: {
        **_LAUNCHING,
        **_stay(State.RESTARTING, AttemptStarted, *_COURSE),
    },
    State.RUNNING: {
        RunStarted: State.STARTING,
        StopRequested: State.STOPPING,
        Action.RESTART: State.RESTARTING,
        Action.ROLL_BACK: State.RESTARTING,
        **_ENDS,
        **_stay(State.RUNNING, FirstStep, Progress, *_COURSE),
    },
    State.STOPPING: {  # the request may meet an attempt that is just being launched
        RunStarted: State.STARTING,
        **_ENDS,
        StopWithdrawn: State.RUNNING,  # wherever the attempt was: its first step may come yet
        **_stay(State.STOPPING, StopRequested, AttemptStarted, FirstStep, Progress, *_COURSE),
    },
    **{
        end: {RunStarted: State.STARTING, **_stay(end, StopRequested, RunEnded, *_NOTICED, *_STORED)}
        for end in (State.COMPLETED, State.PREEMPTED, State.FAILED)
    },
}


def apply(record: JobRecord, fact: Fact) -> JobRecord:
    """The job after ``fact``. Raises ProtocolError when the fact is impossible in the record's state."""
    state = _next_state(record, fact)
    _check_attempt(record, fact)
    if isinstance(fact, RunStarted):  # the time since a killed run's last fact was under nobody's supervision
        record = record.with_(supervised=False, activity=Activity.STOPPED)
    record = goodput.advance(record, fact.time)
    return absorb(record, fact).with_(state=state)


def fold(facts: Iterable[Fact], record: JobRecord = NEW_JOB) -> JobRecord:
    """The job that a journal tells of. Raises ProtocolError at the first impossible fact."""
    for fact in facts:
        record = apply(record, fact)
    return record


def replay(facts: Iterable[Fact], record: JobRecord = NEW_JOB) -> tuple[JobRecord, list[str]]:
    """As ``fold``, but an impossible fact (its predecessor's line was lost) is skipped and named in the list."""
    problems: list[str] = []
    for fact in facts:
        try:
            record = apply(record, fact)
        except ProtocolError as error:
            problems.append(str(error))
    return record, problems


def is_over(state: State) -> bool:
    """Whether the job needs no supervisor any more, or none until it is started again."""
    return state in (State.COMPLETED, State.PREEMPTED, State.FAILED)


def _next_state(record: JobRecord, fact: Fact) -> State:
    event: Event = fact.action if isinstance(fact, Decided) else type(fact)
    row = TRANSITIONS[record.state]
    if event in row:
        return row[event]
    allowed = ", ".join(sorted(map(_name, row)))
    raise ProtocolError(
        f"{_name(event)} cannot happen to a job that is {record.state}: allowed are {allowed}"
    )


def _name(event: Event) -> str:
    return f"Decided({event.value})" if isinstance(event, Action) else event.__name__


def _check_attempt(record: JobRecord, fact: Fact) -> None:
    match fact:
        case AttemptStarted(attempt=attempt) if record.attempt is not None and attempt <= record.attempt:
            raise ProtocolError(
                f"AttemptStarted with attempt {attempt} after attempt {record.attempt}: "
                f"numbers are never reused, the next is {record.attempt + 1}"
            )
        case (
            Resumed(attempt=attempt)
            | WorkersReady(attempt=attempt)
            | FirstStep(attempt=attempt)
            | Progress(attempt=attempt)
            | AttemptEnded(attempt=attempt)
        ) if attempt != record.attempt:
            raise ProtocolError(
                f"{type(fact).__name__} of attempt {attempt}, but the job that is {record.state} "
                f"is at attempt {record.attempt}"
            )
