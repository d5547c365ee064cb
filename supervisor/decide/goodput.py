"""How much of the time under supervision went into steps that still count.

    goodput = productive seconds / supervised seconds

*Supervised* is wall time during which a supervisor was in charge. Gaps between two runs (the machine was taken away,
the user went home) are not ours: from the last fact of one run to the start of the next nothing is counted.

*Productive* is the time from an attempt's first completed step to its newest one. The launch, the imports, the restore
and the first step (it compiles, it allocates) are overhead; so is the time between the last step and the relaunch.

A *stretch* is what one attempt trained from where it resumed. When its successor resumes below the furthest step that
was reached, the difference is lost: those steps are done again. A stretch that loses a share of its steps loses that
share of its seconds. Losing more than the stretch (a damaged checkpoint sends the job further back) takes the rest from
all stretches before, in proportion: they are known only as a sum. So both terms only ever describe work that stands,
``0 <= productive <= supervised`` holds throughout, and a job's goodput can fall when a loss is found.

Without a Session nobody says where an attempt resumed, and no loss is counted: the steps of each attempt are its own.
"""

from __future__ import annotations

from supervisor.model import JobRecord


def ratio(productive_seconds: float, supervised_seconds: float) -> float:
    """Goodput as a fraction in [0, 1]; 0 before any time has passed."""
    if supervised_seconds <= 0:
        return 0.0
    return min(1.0, max(0.0, productive_seconds / supervised_seconds))


def advance(record: JobRecord, time: float) -> JobRecord:
    """Let the clock run to ``time``; a wall clock that was set back stands still instead."""
    if record.last_time is None:
        return record.with_(first_time=time, last_time=time)
    elapsed = max(0.0, time - record.last_time)
    supervised = record.supervised_seconds + (elapsed if record.supervised else 0.0)
    return record.with_(last_time=record.last_time + elapsed, supervised_seconds=supervised)


def worked(record: JobRecord, step: int) -> JobRecord:
    """Count the time up to now (``last_time``) as productive if ``step`` completed steps are news."""
    now = record.last_time
    if not record.supervised or now is None:
        return record
    if record.attempt_first_time is None or record.attempt_last_time is None:  # the attempt's first step
        if record.resumed_step is None:  # no Session: where it began is known only now
            record = record.with_(stretch_step=max(0, step - 1), stretch_seconds=0.0, furthest_step=step)
        return record.with_(
            step=step,
            attempt_first_time=now,
            attempt_last_time=now,
            attempt_first_step=step,
            furthest_step=max(record.furthest_step, step),
        )
    if step <= record.step:
        return record
    seconds = now - record.attempt_last_time
    return record.with_(
        rate=_smooth(record.rate, step - record.step, seconds),
        step=step,
        attempt_last_time=now,
        furthest_step=max(record.furthest_step, step),
        productive_seconds=record.productive_seconds + seconds,
        stretch_seconds=record.stretch_seconds + seconds,
    )


def ended(record: JobRecord, step: int | None) -> JobRecord:
    """Count the steps between the last sign of life and the end, at the attempt's own pace, in the time there was."""
    if step is None or record.attempt_last_time is None or record.last_time is None or not record.supervised:
        return record
    extra = step - record.step
    if extra <= 0:
        return record
    seconds = record.last_time - record.attempt_last_time
    counted = record.step - (record.attempt_first_step or 0)
    if counted > 0:
        seconds = min(seconds, extra * record.stretch_seconds / counted)
    return record.with_(
        step=step,
        furthest_step=max(record.furthest_step, step),
        productive_seconds=record.productive_seconds + seconds,
        stretch_seconds=record.stretch_seconds + seconds,
    )


def resumed(record: JobRecord, step: int) -> JobRecord:
    """Begin a new stretch at ``step`` and take out of the account what lies beyond it."""
    lost = max(0, record.furthest_step - step)
    productive = record.productive_seconds
    if lost:
        stretch = max(0, record.furthest_step - record.stretch_step)
        from_stretch = min(lost, stretch)
        before = productive - record.stretch_seconds
        kept = record.stretch_seconds * (1 - from_stretch / stretch) if stretch else 0.0
        if lost > from_stretch and record.stretch_step > 0:
            before *= max(0.0, 1 - (lost - from_stretch) / record.stretch_step)
        productive = max(0.0, before + kept)
    return record.with_(
        step=step,
        resumed_step=step,
        lost_steps=record.lost_steps + lost,
        productive_seconds=productive,
        stretch_step=step,
        stretch_seconds=0.0,
        furthest_step=step,
    )


def at(record: JobRecord, step: int, now: float) -> tuple[float, float]:
    """(productive, supervised) seconds of a job that is alive at ``now`` with ``step`` completed steps."""
    live = advance(record, now)
    if record.attempt_first_time is not None:
        live = worked(live, step)
    return live.productive_seconds, live.supervised_seconds


def _smooth(rate: float | None, steps: int, seconds: float) -> float | None:
    """An average that forgets over about a minute, whatever the spacing of the facts."""
    if seconds <= 0:
        return rate
    if rate is None:
        return steps / seconds
    weight = seconds / (seconds + 60.0)
    return rate + weight * (steps / seconds - rate)
