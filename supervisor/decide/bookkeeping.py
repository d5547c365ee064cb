"""What each fact adds to a job's record: steps, states that are held, budgets, time. The state it leads to: ``lifecycle``.

Budgets refill by *progress*: a snapshot or checkpoint of a step beyond every step that was ever held whole at the last
failure. Reaching the same step again is no progress, so a job that cannot pass one step runs out of budget however
often it is saved before it. A job that gave up and is started again by its user gets a fresh budget: something changed.
"""

from __future__ import annotations

from supervisor.decide import goodput, rollback
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
    NoticeWithdrawn,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
    SnapshotCompleted,
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


def absorb(record: JobRecord, fact: Fact) -> JobRecord:
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
        record = goodput.worked(record, fact.step, since=fact.stepped).with_(
            metrics={**record.metrics, **fact.metrics}
        )
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
