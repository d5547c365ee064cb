"""What to do after an attempt has ended: one table from the kind of failure to a rule, and two budgets.

A rule answers only whether trying again is pointless for this kind of failure; ``decide`` adds the budgets and the pause.
The record is the one *after* the AttemptEnded was applied, so it already counts this failure.

The first failure since progress is answered at once: most are one-off, and each second is a second of all ranks. Only
repeated failures without progress pause before the next try, doubling from one second to a minute. A network that fails
before the first step (names, downloads, the rendezvous) takes its time to come back: those pauses begin at the first
failure, with five seconds.

Numbers that have gone wrong have rules and a budget of their own where the guard is on: ``rollback``.
"""

from __future__ import annotations

from collections.abc import Callable

from supervisor.decide import rollback
from supervisor.model import Action, Failure, FailureKind, StopCause, StopRequested, Verdict
from supervisor.record import JobRecord

#: why another attempt would be pointless; None: it might work
Rule = Callable[[JobRecord, Failure], str | None]

#: EX_TEMPFAIL: the state is saved, and the same command carries on
EXIT_AGAIN = 75

_LONGEST_DELAY = 60.0
_NETWORK_DELAY = 5.0


def _always(answer: str | None) -> Rule:
    return lambda _record, _failure: answer


def _deterministic(record: JobRecord, failure: Failure) -> str | None:
    """Code fails the same way at the same place: once more is allowed, twice is proof."""
    if record.previous_fingerprint != failure.fingerprint:
        return None
    where = f"after step {failure.step}" if failure.step else "before the first step"
    return f"the same error twice in a row {where}, so it would happen again"


def _deterministic_if_raised(record: JobRecord, failure: Failure) -> str | None:
    return _deterministic(record, failure) if failure.exception else None


#: the world may be different next time
_hopeful = _always(None)

RULES: dict[FailureKind, Rule] = {
    FailureKind.CRASH: _hopeful,
    FailureKind.HOST_OOM: _hopeful,
    FailureKind.CUDA_OOM: _deterministic,
    FailureKind.DEVICE: _hopeful,
    FailureKind.COMMUNICATION: _hopeful,
    FailureKind.NUMERIC: _deterministic,
    FailureKind.STORAGE: _hopeful,
    FailureKind.EXCEPTION: _deterministic,
    FailureKind.STARTUP: _always("the program cannot start, and trying again would not change that"),
    FailureKind.EARLY_EXIT: _deterministic,
    FailureKind.STATE_MISMATCH: _always(
        "the saved state does not fit the training: restore the old code, or start in a new --dir"
    ),
    FailureKind.LAUNCHER: _deterministic_if_raised,
    FailureKind.HANG: _hopeful,
    FailureKind.NODE_LOST: _hopeful,
}


def decide(record: JobRecord, failure: Failure) -> Verdict:
    """The verdict on an attempt that failed. A stop that was asked for is carried out whatever else happened."""
    if record.stop is not None:
        return decide_stop(record, record.stop)
    if (rolled_back := rollback.decide(record, failure)) is not None:
        return rolled_back
    pointless = RULES[failure.kind](record, failure)
    if pointless is not None:
        return Verdict(action=Action.GIVE_UP, reason=f"giving up: {failure.reason}; {pointless}")
    failures, allowed = record.failures_since_progress, record.limits.max_failures
    if failures > allowed:
        count = "1 failure" if failures == 1 else f"{failures} failures"
        return Verdict(
            action=Action.GIVE_UP,
            reason=f"giving up: {failure.reason}; {count} without progress, --max-failures allows {allowed}",
        )
    delay = _delay(failure, failures)
    when = f"in {delay:g} s" if delay else "now"
    return Verdict(
        action=Action.RESTART,
        delay=delay,
        reason=f"restarting {when}: {failure.reason} (failure {failures} of {allowed} without progress)",
    )


def _delay(failure: Failure, failures: int) -> float:
    if failure.kind is FailureKind.COMMUNICATION and not failure.step:
        return min(_LONGEST_DELAY, _NETWORK_DELAY * 2.0 ** min(failures - 1, 10))
    return 0.0 if failures <= 1 else min(_LONGEST_DELAY, 2.0 ** min(failures - 2, 10))


def decide_stop(record: JobRecord, stop: StopRequested) -> Verdict:
    """The verdict on an attempt that was stopped (or failed while stopping), or on a stop between two attempts."""
    saved = _saved(record)
    if stop.cause is StopCause.USER:
        return Verdict(
            action=Action.STOP, reason=f"stopped by {stop.source}; {saved}; the same command carries on"
        )
    preemptions, allowed = record.preemptions_since_progress + 1, record.limits.max_preemptions
    if preemptions > allowed:
        return Verdict(
            action=Action.GIVE_UP,
            reason=f"giving up: preempted by {stop.source}, {preemptions} times without progress, "
            f"--max-preemptions allows {allowed}; {saved}",
        )
    return Verdict(
        action=Action.STOP,
        reason=f"preempted by {stop.source}; {saved}; run the same command again to carry on",
    )


def decide_finished(record: JobRecord) -> Verdict:
    """The verdict on an attempt in which every rank exited with code 0 by itself."""
    if record.total_steps is None:
        steps = f"after step {record.step}" if record.step else "without reporting a step"
    elif record.step >= record.total_steps:
        steps = f"after all {record.total_steps} steps"
    else:
        steps = f"after {record.step} of {record.total_steps} steps, by its own choice"
    return Verdict(action=Action.COMPLETE, reason=f"finished {steps}")


def exit_code(action: Action, stop: StopRequested | None = None) -> int:
    """What ``everstep run`` exits with after a final verdict. One after which it goes on has no exit code: ValueError."""
    match action:
        case Action.COMPLETE:
            return 0
        case Action.GIVE_UP:
            return 1
        case Action.STOP:
            return 130 if stop is not None and stop.cause is StopCause.USER else EXIT_AGAIN
        case Action.RESTART | Action.ROLL_BACK:
            raise ValueError("a restart does not end the run")


def _saved(record: JobRecord) -> str:
    point = record.checkpoint
    if point is None or (record.snapshot is not None and record.snapshot.step > point.step):
        point = record.snapshot
    if point is None:
        return "no state was saved"
    where = "" if point is record.checkpoint else " in this host's memory"
    return f"state saved at step {point.step}{where}"
