from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import restart
from supervisor.model import (
    Action,
    Failure,
    FailureKind,
    Limits,
    StopCause,
    StopRequested,
)
from supervisor.record import JobRecord, Point

HOPEFUL = {
    FailureKind.CRASH,
    FailureKind.HOST_OOM,
    FailureKind.DEVICE,
    FailureKind.COMMUNICATION,
    FailureKind.STORAGE,
    FailureKind.HANG,
    FailureKind.NODE_LOST,
}


def failure(
    kind: FailureKind = FailureKind.EXCEPTION,
    *,
    step: int | None = 41,
    exception: str | None = "ValueError: x",
) -> Failure:
    return Failure(
        kind=kind, reason="rank 1 raised ValueError: x", attempt=3, time=0, step=step, exception=exception
    )


def record(
    failures: int = 1, *, previous: Failure | None = None, allowed: int = 3, stop: StopRequested | None = None
) -> JobRecord:
    return JobRecord(
        failures_since_progress=failures,
        limits=Limits(max_failures=allowed, max_preemptions=2),
        previous_fingerprint=previous.fingerprint if previous else None,
        stop=stop,
    )


def preempted() -> StopRequested:
    return StopRequested(time=0, cause=StopCause.PREEMPTION, source="SIGTERM")


@pytest.mark.parametrize("kind", sorted(set(FailureKind) - {FailureKind.STARTUP, FailureKind.STATE_MISMATCH}))
def test_the_first_failure_is_answered_at_once(kind: FailureKind) -> None:
    verdict = restart.decide(record(), failure(kind))
    assert (verdict.action, verdict.delay) == (Action.RESTART, 0.0)
    assert verdict.reason == "restarting now: rank 1 raised ValueError: x (failure 1 of 3 without progress)"


@pytest.mark.parametrize("kind", sorted(FailureKind))
def test_the_same_failure_twice_is_proof_for_code_and_chance_for_the_rest(kind: FailureKind) -> None:
    same = failure(kind)
    action = restart.decide(record(2, previous=same), same).action
    assert action is (Action.RESTART if kind in HOPEFUL else Action.GIVE_UP)


def test_a_deterministic_failure_is_said_to_be_one() -> None:
    verdict = restart.decide(record(2, previous=failure()), failure())
    assert verdict.reason == (
        "giving up: rank 1 raised ValueError: x; "
        "the same error twice in a row after step 41, so it would happen again"
    )
    early = failure(step=None)
    assert "twice in a row before the first step" in restart.decide(record(2, previous=early), early).reason


@pytest.mark.parametrize(
    "other", [failure(step=42), failure(exception="ValueError: y"), failure(FailureKind.NUMERIC)]
)
def test_another_step_or_error_is_another_failure(other: Failure) -> None:
    assert restart.decide(record(2, previous=other), failure()).action is Action.RESTART


def test_an_objects_address_does_not_make_another_error() -> None:
    first, second = (
        failure(exception="KeyError: <T at 0x7fab01>"),
        failure(exception="KeyError: <T at 0x7fcd99>"),
    )
    assert restart.decide(record(2, previous=first), second).action is Action.GIVE_UP


@pytest.mark.parametrize("kind", [FailureKind.STARTUP, FailureKind.STATE_MISMATCH])
def test_what_cannot_work_is_not_tried_again(kind: FailureKind) -> None:
    assert restart.decide(record(), failure(kind)).action is Action.GIVE_UP


def test_a_launcher_that_fails_without_a_word_may_work_next_time() -> None:
    silent = failure(FailureKind.LAUNCHER, exception=None)
    assert restart.decide(record(2, previous=silent), silent).action is Action.RESTART


def test_the_budget_is_named_when_it_is_spent() -> None:
    crash = failure(FailureKind.CRASH)
    assert restart.decide(record(3), crash).action is Action.RESTART
    verdict = restart.decide(record(4), crash)
    assert verdict.action is Action.GIVE_UP
    assert verdict.reason.endswith("; 4 failures without progress, --max-failures allows 3")
    assert restart.decide(record(1, allowed=0), crash).reason.endswith(
        "1 failure without progress, --max-failures allows 0"
    )


def test_only_repeated_failures_wait_and_never_long() -> None:
    delays = [restart.decide(record(n, allowed=100), failure(FailureKind.CRASH)).delay for n in range(1, 12)]
    assert delays == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_a_network_that_fails_at_the_start_is_given_time() -> None:
    lost = failure(FailureKind.COMMUNICATION, step=None, exception="gaierror: [Errno -3] Temporary failure")
    verdicts = [restart.decide(record(n, allowed=5, previous=lost), lost) for n in range(1, 7)]
    assert [verdict.delay for verdict in verdicts] == [5, 10, 20, 40, 60, 0]
    assert [verdict.action for verdict in verdicts] == [Action.RESTART] * 5 + [Action.GIVE_UP]


def test_a_stop_that_was_asked_for_is_carried_out_whatever_broke() -> None:
    verdict = restart.decide(record(99, stop=preempted()), failure(FailureKind.STARTUP))
    assert verdict.action is Action.STOP


class TestStop:
    def test_says_what_was_saved_and_what_to_do(self) -> None:
        point = Point(step=120, time=0)
        assert restart.decide_stop(JobRecord(checkpoint=point), preempted()).reason == (
            "preempted by SIGTERM; state saved at step 120; run the same command again to carry on"
        )
        user = StopRequested(time=0, cause=StopCause.USER, source="Ctrl-C")
        assert restart.decide_stop(
            JobRecord(checkpoint=point, snapshot=Point(step=130, time=0)), user
        ).reason == (
            "stopped by Ctrl-C; state saved at step 130 in this host's memory; the same command carries on"
        )
        assert "no state was saved" in restart.decide_stop(JobRecord(), user).reason

    def test_has_a_budget_of_its_own(self) -> None:
        def verdict(preemptions: int) -> Action:
            job = JobRecord(preemptions_since_progress=preemptions, limits=Limits(max_preemptions=2))
            return restart.decide_stop(job, preempted()).action

        assert [verdict(n) for n in range(4)] == [Action.STOP, Action.STOP, Action.GIVE_UP, Action.GIVE_UP]

    def test_a_user_may_stop_as_often_as_they_like(self) -> None:
        user = StopRequested(time=0, cause=StopCause.USER, source="Ctrl-C")
        job = JobRecord(preemptions_since_progress=99, limits=Limits(max_preemptions=0))
        assert restart.decide_stop(job, user).action is Action.STOP


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (JobRecord(step=10, total_steps=10), "finished after all 10 steps"),
        (JobRecord(step=7, total_steps=10), "finished after 7 of 10 steps, by its own choice"),
        (JobRecord(step=7), "finished after step 7"),
        (JobRecord(), "finished without reporting a step"),
    ],
)
def test_finished(job: JobRecord, reason: str) -> None:
    verdict = restart.decide_finished(job)
    assert (verdict.action, verdict.reason) == (Action.COMPLETE, reason)


def test_exit_codes() -> None:
    user = StopRequested(time=0, cause=StopCause.USER, source="SIGINT")
    assert restart.exit_code(Action.COMPLETE) == 0
    assert restart.exit_code(Action.GIVE_UP, preempted()) == 1
    assert restart.exit_code(Action.STOP, preempted()) == 75
    assert restart.exit_code(Action.STOP, user) == 130
    with pytest.raises(ValueError, match="restart"):
        restart.exit_code(Action.RESTART)


@given(
    st.sampled_from(FailureKind),
    st.integers(1, 500),
    st.integers(0, 200),
    st.booleans(),
    st.sampled_from([None, 0, 5]),
)
def test_every_verdict_is_one_line_within_the_budget(
    kind: FailureKind, failures: int, allowed: int, same: bool, step: int | None
) -> None:
    this = failure(kind, step=step)
    verdict = restart.decide(record(failures, allowed=allowed, previous=this if same else None), this)
    assert verdict.action in (Action.RESTART, Action.GIVE_UP)
    assert "\n" not in verdict.reason
    assert this.reason in verdict.reason
    assert 0 <= verdict.delay <= 60
    if verdict.action is Action.RESTART:
        assert failures <= allowed


def test_the_same_exception_is_the_same_however_its_process_ended() -> None:
    """gloo may abort a process in its destructors, after the exception that ends it."""
    error = failure(exception="RuntimeError: boom at 0x7f01")
    ends = [
        error,
        replace(error, exit_code=1),
        replace(error, signal=6, exception="RuntimeError: boom at 0x8a"),
    ]
    assert len({end.fingerprint for end in ends}) == 1
    assert (
        len({failure(exception=None).fingerprint, replace(failure(exception=None), signal=6).fingerprint})
        == 2
    )


def test_amounts_of_memory_differ_every_time() -> None:
    words = "OutOfMemoryError: CUDA out of memory. Tried to allocate {} MiB. {} GiB is free"
    first, second = (words.format(*amounts) for amounts in ((20.5, 1), (19, 2.25)))
    oom = FailureKind.CUDA_OOM
    assert failure(oom, exception=first).fingerprint == failure(oom, exception=second).fingerprint
    assert failure(exception=first).fingerprint != failure(exception=second).fingerprint
