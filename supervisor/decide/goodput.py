"""What every second of a job went into, and how much of it into steps that still count.

    goodput = productive seconds / supervised seconds

Each fact puts the time since the one before into the record's current *activity* (``timesheet.py`` lists them), so the
entries always sum to the wall time since the job's first fact; what turns out later only moves seconds between entries:

- While an attempt makes steps, time is *detection* until a newer step is heard of, and *productive* then: if the attempt
  dies, what is left is the time from its last step to the moment its failure was noticed. What follows is *teardown*.
- The stall of a snapshot is taken out of the productive time around it.
- *Start-up* ends with the attempt's first completed step (it compiles, it allocates); the part of it that a rank spent
  reading its state back is *restore*.
- *Stopped* is the time without a supervisor (the machine was taken away, the user went home) and the pauses between
  attempts. It is not supervised time. A supervisor that was killed is missed from its last fact on.

A *stretch* is what one attempt trained from where it resumed. When its successor resumes below the furthest step that
was reached, the difference is lost: those steps are done again, and the time they took becomes *redone*. A stretch that
loses a share of its steps loses that share of its seconds. Losing more than the stretch (a damaged checkpoint sends the
job further back) takes the rest from all stretches before, in proportion: they are known only as a sum. So goodput only
ever describes work that stands, and can fall when a loss is found.

Without a Session nobody says where an attempt resumed, and no loss is counted: the steps of each attempt are its own.
"""

from __future__ import annotations

from supervisor.record import JobRecord
from supervisor.timesheet import Activity, Timesheet


def advance(record: JobRecord, time: float) -> JobRecord:
    """Let the clock run to ``time``; a wall clock that was set back stands still instead."""
    if record.last_time is None:
        return record.with_(last_time=time)
    elapsed = max(0.0, time - record.last_time)
    spent = record.spent.spent(record.activity, elapsed) if elapsed else record.spent
    return record.with_(last_time=record.last_time + elapsed, spent=spent)


def worked(
    record: JobRecord, step: int, restore_seconds: float = 0.0, since: float | None = None
) -> JobRecord:
    """Count the time up to now (``last_time``) as productive if ``step`` completed steps are news.

    ``since``: when the last of them was complete, in Unix seconds; what follows may be a hang.
    """
    now = record.last_time
    if not record.supervised or now is None:
        return record
    if record.attempt_first_time is None or record.attempt_last_time is None:  # the attempt's first step
        if record.resumed_step is None:  # no Session: where it began is known only now
            record = record.with_(stretch_step=max(0, step - 1), stretch_seconds=0.0, furthest_step=step)
        return record.with_(
            step=step,
            activity=Activity.DETECTION,
            spent=record.spent.moved(restore_seconds, Activity.STARTUP, Activity.RESTORE),
            attempt_first_time=now,
            attempt_last_time=now,
            attempt_first_step=step,
            furthest_step=max(record.furthest_step, step),
        )
    if step <= record.step:
        return record
    now = max(record.attempt_last_time, now if since is None else min(now, since))
    seconds = now - record.attempt_last_time
    record = record.with_(
        rate=_smooth(record.rate, step - record.step, seconds), step=step, attempt_last_time=now
    )
    return _productive(record, seconds)


def stalled(record: JobRecord, seconds: float) -> JobRecord:
    """Take the training's stall for a snapshot out of what the attempt did."""
    seconds = min(seconds, record.stretch_seconds)
    return record.with_(
        spent=record.spent.moved(seconds, Activity.PRODUCTIVE, Activity.SNAPSHOT),
        stretch_seconds=record.stretch_seconds - seconds,
    )


def ended(record: JobRecord, step: int | None, noticed: float | None) -> JobRecord:
    """Put down the time from the last sign of life to now, when nothing of the attempt is left.

    The steps since count at the attempt's own pace, in the time there was until its end was ``noticed`` (Unix seconds; None: it
    ended in order).
    """
    now = record.last_time
    if not record.supervised or now is None:
        return record
    since = 0.0 if noticed is None else min(noticed, now)
    if record.attempt_last_time is not None:
        record = _last_steps(record, step, max(0.0, (since or now) - record.attempt_last_time))
    begun = record.attempt_last_time if record.attempt_last_time is not None else record.attempt_time
    seconds = now - max(since, begun if begun is not None else now)
    return record.with_(
        spent=record.spent.moved(seconds, record.activity, Activity.TEARDOWN), activity=Activity.TEARDOWN
    )


def resumed(record: JobRecord, step: int) -> JobRecord:
    """Begin a new stretch at ``step`` and take out of the account what lies beyond it."""
    lost = max(0, record.furthest_step - step)
    redone = 0.0
    if lost:
        stretch = max(0, record.furthest_step - record.stretch_step)
        from_stretch = min(lost, stretch)
        redone = record.stretch_seconds * from_stretch / stretch if stretch else record.stretch_seconds
        if lost > from_stretch and record.stretch_step > 0:
            before = record.spent.productive - record.stretch_seconds
            redone += before * min(1.0, (lost - from_stretch) / record.stretch_step)
    return record.with_(
        step=step,
        resumed_step=step,
        lost_steps=record.lost_steps + lost,
        spent=record.spent.moved(redone, Activity.PRODUCTIVE, Activity.REDONE),
        stretch_step=step,
        stretch_seconds=0.0,
        furthest_step=step,
    )


def at(record: JobRecord, step: int, now: float) -> Timesheet:
    """What the time of a job that is alive went into, at ``now`` with ``step`` completed steps."""
    live = advance(record, now)
    if record.attempt_first_time is not None:
        live = worked(live, step)
    return live.spent


def _last_steps(record: JobRecord, step: int | None, seconds: float) -> JobRecord:
    extra = 0 if step is None else step - record.step
    if extra <= 0:
        return record
    counted = record.step - (record.attempt_first_step or 0)
    if counted > 0:
        seconds = min(seconds, extra * record.stretch_seconds / counted)
    last = (record.attempt_last_time or 0.0) + seconds
    return _productive(record.with_(step=step, attempt_last_time=last), seconds)


def _productive(record: JobRecord, seconds: float) -> JobRecord:
    """``seconds`` that were not accounted for yet went into the steps up to ``record.step``."""
    spent = record.spent.moved(seconds, Activity.DETECTION, Activity.PRODUCTIVE)
    return record.with_(
        furthest_step=max(record.furthest_step, record.step),
        stretch_seconds=record.stretch_seconds + spent.productive - record.spent.productive,
        spent=spent,
    )


def _smooth(rate: float | None, steps: int, seconds: float) -> float | None:
    """An average that forgets over about a minute, whatever the spacing of the facts."""
    if seconds <= 0:
        return rate
    if rate is None:
        return steps / seconds
    weight = seconds / (seconds + 60.0)
    return rate + weight * (steps / seconds - rate)
