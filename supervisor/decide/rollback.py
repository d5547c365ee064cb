"""What follows when the numbers have gone wrong (``guard``): which states are bad, where to go back to, what to leave out.

All of it follows from the record, after the AttemptEnded that says so was applied:

- *Bad* is what lies beyond the last step whose numbers were in order. If nothing is left before that, the oldest state before
  the trouble itself is kept: it is not known to be bad.
- *Again* is a trouble that comes before the numbers were in order ``PASSED`` steps beyond the last one. Steps are exact, so from the
  same state the same numbers come again unless something outside was at fault. So each repetition goes ``back`` checkpoints
  further (the state itself may have been spoilt before it was noticed), and with ``times`` of them it is over.
- *A new level*: a jump of the loss (not a number that is none) that ``times`` rollbacks did not get past is accepted, and the job
  goes on with it, once more from a state before it. A loss that jumps again within ``LEVELS_APART`` steps is no level: it diverges.
- *Left out*, if that is asked for, are the ``skip`` steps up to and including the one that showed the trouble; twice as many
  at each repetition, as the cause may lie before what is seen. They stay left out for the rest of the job. A state that has
  learned from some of them is no state to go back to, if there is an older one.

A numeric exception of the script's own (it checks its loss itself) is such a trouble too, once the guard is on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from supervisor.decide.guard import Known
from supervisor.model import Action, Condemned, Failure, FailureKind, Skip, TroubleKind, Verdict
from supervisor.record import JobRecord

PASSED: Final = 50  # steps
LEVELS_APART: Final = 1000  # steps
MOST_DURABLE: Final = 64  # checkpoints that are remembered
_MOST_DOUBLINGS: Final = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """States after ``bad_from`` and more steps are bad. ``number``: the how manieth rollback in a row it would be.

    ``level``: the step in which the loss comes to a new level that is to be accepted.
    """

    bad_from: int
    number: int
    skip: Skip | None = None
    level: int | None = None


def plan(record: JobRecord, failure: Failure) -> Plan | None:
    """None where the guard is off, the failure is another, or there is no Session to go back with."""
    limits, step = record.limits, failure.step
    if limits.guard == "off" or failure.kind is not FailureKind.NUMERIC or record.resumed_step is None:
        return None
    step = record.resumed_step if step is None else step
    good = failure.good
    if good is None:  # the state that the attempt began with has shown nothing but trouble
        good = step - 1 if failure.exception else record.resumed_step - 1
    states = _states(record)
    number = 1
    if record.trouble_step is not None and good < record.trouble_step + PASSED:
        number = record.rollbacks_in_a_row + 1
    bad_from = good + 1
    if 1 < number <= limits.guard_times:
        before = [state for state in states if state < min(bad_from, record.resumed_step)]
        bad_from = before[-min(limits.guard_back, len(before))] + 1 if before else bad_from
    level = step if number > limits.guard_times and _is_level(record, failure, step) else None
    skip = None
    if limits.guard_skip and level is None:
        length = limits.guard_skip << min(number - 1, _MOST_DOUBLINGS)
        skip = Skip(first=max(0, step + 1 - length), stop=step + 1, batches=failure.batches)
        bad_from = min(bad_from, skip.first + 1)
    if not any(state < bad_from for state in states):
        left = next((state for state in states if state <= step), None)
        bad_from = max(bad_from, left + 1) if left is not None else bad_from
        skip = skip and replace(skip, first=max(skip.first, left or 0))
    return Plan(bad_from=max(0, bad_from), number=number, skip=skip, level=level)


def _is_level(record: JobRecord, failure: Failure, step: int) -> bool:
    """Whether what comes again is a jump of the loss, seen from the same states, and the first for long."""
    return (
        failure.trouble is TroubleKind.SPIKE
        and record.rollbacks_in_a_row > 0
        and all(step - level > LEVELS_APART for level in record.levels)
    )


def decide(record: JobRecord, failure: Failure) -> Verdict | None:
    """The verdict on a training whose numbers have gone wrong; None: no case for a rollback."""
    planned = plan(record, failure)
    if planned is None:
        return None
    if planned.number > record.limits.guard_times and planned.level is None:
        return Verdict(
            action=Action.GIVE_UP, reason=f"giving up: {failure.reason}; {_in_vain(record, failure)}"
        )
    what = f"back to a state before step {planned.bad_from}" if planned.bad_from else "back to the beginning"
    if planned.level is not None:
        return Verdict(
            action=Action.ROLL_BACK,
            reason=f"rolling {what} to go on with the new level: {failure.reason}; {_count(record)} did not get past it",
            rollback=planned.number,
            level=planned.level,
        )
    skip = planned.skip
    left_out = f", without {_steps(skip)}" if skip is not None else ""
    return Verdict(
        action=Action.ROLL_BACK,
        reason=f"rolling {what}{left_out}: {failure.reason} "
        f"(rollback {planned.number} of {record.limits.guard_times})",
        rollback=planned.number,
        skip=skip,
    )


def is_condemned(record: JobRecord, attempt: int, step: int) -> bool:
    """Whether the state that ``attempt`` saved after ``step`` steps is bad."""
    return any(attempt <= bad.attempt and step >= bad.step for bad in record.condemned)


def condemn(record: JobRecord, attempt: int, step: int) -> JobRecord:
    """The record without the states that are bad from now on."""
    kept = [bad for bad in record.condemned if bad.attempt > attempt or bad.step < step]
    snapshot, checkpoint = record.snapshot, record.checkpoint
    return record.with_(
        condemned=(*kept, Condemned(attempt=attempt, step=step)),
        durable=tuple(state for state in record.durable if state < step),
        snapshot=None if snapshot is not None and snapshot.step >= step else snapshot,
        checkpoint=None if checkpoint is not None and checkpoint.step >= step else checkpoint,
    )


def carry_out(
    record: JobRecord, number: int, skip: Skip | None = None, level: int | None = None
) -> JobRecord:
    """The record after the verdict to roll back."""
    failure = record.last_failure
    step = failure.step if failure is not None else None
    limit = failure.limit if failure is not None else None
    met = step
    if number > 1 and record.trouble_step is not None:  # two troubles in turns are not each other's progress
        step = max(step or 0, record.trouble_step)
    return record.with_(
        rollbacks=record.rollbacks + 1,
        rollbacks_in_a_row=number,
        trouble_step=step,
        trouble_limit=limit if step == met else None,
        rolled_from=record.resumed_step,
        skips=record.skips if skip is None else leave_out(record.skips, skip),
        levels=record.levels if level is None else (*record.levels, level),
    )


def known(record: JobRecord) -> Known:
    """What the watches of the next attempt are told."""
    return Known(levels=record.levels, step=record.trouble_step or 0, limit=record.trouble_limit)


def leave_out(skips: tuple[Skip, ...], skip: Skip) -> tuple[Skip, ...]:
    """With one more window; those that touch become one."""
    merged: list[Skip] = []
    for each in sorted((*skips, skip), key=lambda one: (one.first, one.stop)):
        if merged and each.first <= merged[-1].stop:
            last = merged.pop()
            stop, batches = max(last.stop, each.stop), {**last.batches, **each.batches}
            each = Skip(first=last.first, stop=stop, batches=batches)
        merged.append(each)
    assert all(one.stop < other.first for one, other in pairwise(merged))
    return tuple(merged)


def past(step: int, skips: tuple[Skip, ...]) -> int:
    """``step``, or the next number of completed steps at which ranks look for a save point, if they pass it by."""
    for skip in skips:
        if skip.first < step <= skip.stop:
            return skip.stop + 1
    return step


def _states(record: JobRecord) -> list[int]:
    """Those that there are to go back to, in order; 0 is always there."""
    snapshot = {record.snapshot.step} if record.snapshot is not None else set()
    begun = set() if record.resumed_step else {0}
    return sorted({*record.durable, *snapshot, *begun})


def _in_vain(record: JobRecord, failure: Failure) -> str:
    if not record.rollbacks_in_a_row:
        return "--guard-times 0 allows no rollback"
    if failure.trouble is TroubleKind.SPIKE and record.levels:
        return f"{_count(record)} did not get past it, and the jump in step {record.levels[-1]} was accepted already"
    advice = "" if record.limits.guard_skip else "; --guard-skip leaves out the data before it"
    return f"{_count(record)} did not get past it, so it would happen again{advice}"


def _count(record: JobRecord) -> str:
    times = record.rollbacks_in_a_row
    return "1 rollback" if times == 1 else f"{times} rollbacks"


def _steps(skip: Skip) -> str:
    return f"step {skip.first}" if skip.stop == skip.first + 1 else f"steps {skip.first} to {skip.stop - 1}"
