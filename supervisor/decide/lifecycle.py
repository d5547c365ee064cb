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

Budgets refill by *progress*: a snapshot or checkpoint of a step beyond every step that was ever held whole at the last
failure. Reaching the same step again is no progress, so a job that cannot pass one step runs out of budget however
often it is saved before it. A job that gave up and is started again by its user gets a fresh budget: something changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from supervisor.decide import goodput, rollback
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
    Limits,
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
    StopCause,
    StopRequested,
    StopWithdrawn,
    Tier,
    WarningCleared,
    WarningRaised,
    WorkersReady,
)
from supervisor.record import JobRecord, Point
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
    return _absorb(record, fact).with_(state=state)


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


def _absorb(record: JobRecord, fact: Fact) -> JobRecord:
    """What a fact adds to the record, the state apart."""
    match fact:
        case RunStarted():
            return _run_started(record, fact)
        case AttemptStarted():
            record = _between(record).with_(attempt_time=record.last_time, activity=Activity.STARTUP)
            return record.with_(attempt=fact.attempt, world_size=None, resumed_step=None, warnings=())
        case WorkersReady():
            return record.with_(world_size=fact.world_size)
        case Resumed():
            return _resumed(record, fact)
        case FirstStep() | Progress():
            return _worked(record, fact)
        case SnapshotCompleted():
            return _snapshot_completed(record, fact)
        case CheckpointCommitted():
            return _checkpointed(record, fact)
        case CheckpointFailed() | CheckpointRejected() | CheckpointsPruned() | StatesCondemned():
            return _not_stored(record, fact)
        case WarningRaised() | WarningCleared():
            return _warned(record, fact)
        case StopRequested() | DeadlineSet() | NoticeWithdrawn() | StopWithdrawn():
            return _noticed(record, fact)
        case AttemptEnded():
            return _attempt_ended(record, fact)
        case Decided():
            return _decided(record, fact)
        case RunEnded():
            record = _between(record).with_(supervised=False, activity=Activity.STOPPED)
            return record.with_(exit_code=fact.exit_code, reason=fact.reason)
        case _:
            return record


def _run_started(record: JobRecord, fact: RunStarted) -> JobRecord:
    if record.state is State.FAILED:
        record = record.with_(failures_since_progress=0, fingerprint=None, previous_fingerprint=None)
        record = record.with_(preemptions_since_progress=0)
        record = record.with_(rollbacks_in_a_row=0, trouble_step=None, trouble_limit=None)
    return _between(record).with_(
        supervised=True,
        warnings=(),
        activity=Activity.STARTUP,
        epoch=max(record.epoch, fact.epoch),
        host=fact.host,
        pid=fact.pid,
        command=fact.command,
        limits=Limits(
            max_failures=fact.max_failures,
            max_preemptions=fact.max_preemptions,
            guard=fact.guard,
            guard_times=fact.guard_times,
            guard_back=fact.guard_back,
            guard_skip=fact.guard_skip,
        ),
        stop=None,
        deadline=None,
        exit_code=None,
        reason=None,
    )


def _between(record: JobRecord) -> JobRecord:
    """No attempt is making steps."""
    return record.with_(attempt_first_time=None, attempt_first_step=None, attempt_last_time=None, rate=None)


def _resumed(record: JobRecord, fact: Resumed) -> JobRecord:
    record = goodput.resumed(record, fact.step).with_(rolled_from=None)
    if fact.tier is not Tier.RAM:  # a snapshot that could have been used would have been
        record = record.with_(snapshot=None)
    if fact.tier is Tier.CHECKPOINT and (record.checkpoint is None or record.checkpoint.step != fact.step):
        record = record.with_(checkpoint=Point(step=fact.step, time=fact.time, path=fact.path))
    if fact.tier is None:  # nor is there a checkpoint, whatever was once committed
        record = record.with_(checkpoint=None, durable=())
    return record


def _worked(record: JobRecord, fact: FirstStep | Progress) -> JobRecord:
    if isinstance(fact, Progress):
        record = goodput.worked(record, fact.step).with_(metrics={**record.metrics, **fact.metrics})
    else:
        record = goodput.worked(record, fact.step, fact.restore_seconds)
    return record.with_(total_steps=fact.total_steps) if fact.total_steps is not None else record


def _snapshot_completed(record: JobRecord, fact: SnapshotCompleted) -> JobRecord:
    point = Point(step=fact.step, time=fact.time, bytes=fact.bytes, seconds=fact.seconds)
    record = _progressed(record.with_(snapshot=point), fact.step)
    if record.attempt_first_time is None or fact.attempt != record.attempt:
        return record
    return goodput.stalled(
        goodput.worked(record, fact.step), fact.seconds if fact.stalled is None else fact.stalled
    )


def _checkpointed(record: JobRecord, fact: CheckpointCommitted) -> JobRecord:
    durable = sorted({*record.durable, fact.step})[-rollback.MOST_DURABLE :]
    record = record.with_(checkpoint=_newest(record.checkpoint, fact), durable=tuple(durable))
    if not fact.emergency:
        record = record.with_(drain_failure=None, drain_failure_time=None)
    return _progressed(record, fact.step)


def _not_stored(
    record: JobRecord, fact: CheckpointFailed | CheckpointRejected | CheckpointsPruned | StatesCondemned
) -> JobRecord:
    if isinstance(fact, CheckpointFailed):
        return record.with_(drain_failure=fact.reason, drain_failure_time=fact.time)
    if isinstance(fact, StatesCondemned):
        return rollback.condemn(record, fact.attempt, fact.step)
    if _is_gone(record.checkpoint, fact):
        record = record.with_(checkpoint=None)
    if isinstance(fact, CheckpointsPruned):
        return record.with_(durable=tuple(step for step in record.durable if step not in fact.steps))
    name = fact.path.rpartition("step-")[2]
    return record.with_(durable=tuple(step for step in record.durable if f"{step:09d}" != name))


def _warned(record: JobRecord, fact: WarningRaised | WarningCleared) -> JobRecord:
    about = fact.kind, fact.rank
    others = tuple(warning for warning in record.warnings if (warning.kind, warning.rank) != about)
    return record.with_(warnings=(*others, fact) if isinstance(fact, WarningRaised) else others)


def _is_gone(known: Point | None, fact: CheckpointRejected | CheckpointsPruned) -> bool:
    if known is None:
        return False
    return known.path == fact.path if isinstance(fact, CheckpointRejected) else known.step in fact.steps


def _newest(known: Point | None, fact: CheckpointCommitted) -> Point:
    if known is not None and known.step > fact.step:
        return known
    return Point(
        step=fact.step,
        time=fact.time,
        bytes=fact.bytes,
        seconds=fact.seconds,
        path=fact.path,
        metrics=fact.metrics,
    )


def _progressed(record: JobRecord, step: int) -> JobRecord:
    """``step`` is held whole: refill the budgets if that is further than at the last failure."""
    record = record.with_(committed_step=max(record.committed_step, step))
    if step > record.failure_committed_step:
        record = record.with_(failures_since_progress=0)
        if record.last_failure is None or step > (record.last_failure.step or 0):
            # up to there it only makes good what was lost, and the same error may wait at the same step
            record = record.with_(fingerprint=None, previous_fingerprint=None)
    if step > record.preemption_committed_step:
        record = record.with_(preemptions_since_progress=0)
    return record


def _noticed(record: JobRecord, fact: Fact) -> JobRecord:
    match fact:
        case StopRequested():
            return record.with_(stop=fact)
        case StopWithdrawn():
            return record.with_(stop=None)
        case DeadlineSet():
            return record.with_(deadline=fact)
        case NoticeWithdrawn(source=source) if record.deadline and record.deadline.source == source:
            return record.with_(deadline=None)
    return record


def _attempt_ended(record: JobRecord, fact: AttemptEnded) -> JobRecord:
    record = _between(goodput.ended(record, fact.step, fact.noticed))
    record = record.with_(metrics={**record.metrics, **fact.metrics})
    if fact.total_steps is not None:
        record = record.with_(total_steps=fact.total_steps)
    if fact.failure is None:
        return record
    return record.with_(
        previous_fingerprint=record.fingerprint,
        fingerprint=fact.failure.fingerprint,
        last_failure=fact.failure,
        failures_since_progress=record.failures_since_progress + 1,
        failure_committed_step=record.committed_step,
    )


def _decided(record: JobRecord, fact: Decided) -> JobRecord:
    record = record.with_(reason=fact.reason)
    if fact.action is Action.RESTART:
        activity = Activity.STOPPED if fact.delay else Activity.STARTUP
        return record.with_(restarts=record.restarts + 1, activity=activity)
    if fact.action is Action.ROLL_BACK:
        record = record.with_(restarts=record.restarts + 1, activity=Activity.STARTUP)
        return rollback.carry_out(record, fact.rollback, fact.skip, fact.level)
    if fact.action is Action.STOP and record.stop is not None and record.stop.cause is StopCause.PREEMPTION:
        return record.with_(
            preemptions=record.preemptions + 1,
            preemptions_since_progress=record.preemptions_since_progress + 1,
            preemption_committed_step=record.committed_step,
        )
    return record
