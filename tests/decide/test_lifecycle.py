from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import lifecycle, restart
from supervisor.errors import ProtocolError
from supervisor.model import (
    FACTS,
    Action,
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    Decided,
    Fact,
    Failure,
    FailureKind,
    FirstStep,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
    SnapshotCompleted,
    State,
    StopCause,
    StopRequested,
    Tier,
    WorkersReady,
)
from supervisor.record import JobRecord
from tests.journals import journals


def run_started(time: float = 0.0, *, epoch: int = 1, pid: int = 7) -> RunStarted:
    return RunStarted(
        time=time, epoch=epoch, host="h", pid=pid, command=("x",), version="0", max_failures=3, max_preemptions=2
    )  # fmt: skip


def failed(
    attempt: int, step: int | None, *, time: float = 0.0, exception: str | None = "ValueError: x"
) -> AttemptEnded:
    failure = Failure(
        kind=FailureKind.EXCEPTION, reason="r", attempt=attempt, time=time, step=step, exception=exception
    )
    return AttemptEnded(time=time, attempt=attempt, step=step, failure=failure)


def decided(action: Action, attempt: int = 0, time: float = 0.0) -> Decided:
    return Decided(time=time, attempt=attempt, action=action, reason="because")


def snapshot(step: int, attempt: int = 0, time: float = 0.0) -> SnapshotCompleted:
    return SnapshotCompleted(time=time, attempt=attempt, step=step, seconds=0.0, bytes=1)


def running(step: int = 1, total: int | None = None) -> list[Fact]:
    return [
        run_started(),
        AttemptStarted(time=0, attempt=0),
        Resumed(time=0, attempt=0, step=0),
        WorkersReady(time=0, attempt=0, world_size=2),
        FirstStep(time=0, attempt=0, step=step, total_steps=total),
    ]


class TestTable:
    def test_a_job_goes_from_new_to_completed(self) -> None:
        facts = [*running(), AttemptEnded(time=0, attempt=0, step=9, finished=True), decided(Action.COMPLETE)]
        record, states = JobRecord(), []
        for fact in facts:
            record = lifecycle.apply(record, fact)
            states.append(record.state)
        assert states == [State.STARTING] * 4 + [State.RUNNING] * 2 + [State.COMPLETED]

    @pytest.mark.parametrize(
        ("action", "state"),
        [
            (Action.RESTART, State.RESTARTING),
            (Action.STOP, State.PREEMPTED),
            (Action.GIVE_UP, State.FAILED),
            (Action.COMPLETE, State.COMPLETED),
        ],
    )
    def test_each_verdict_leads_to_its_state(self, action: Action, state: State) -> None:
        assert lifecycle.fold([*running(), decided(action)]).state is state

    def test_restarting_lasts_until_the_first_step_of_the_next_attempt(self) -> None:
        record = lifecycle.fold(
            [*running(), failed(0, 3), decided(Action.RESTART), AttemptStarted(time=0, attempt=1)]
        )
        assert record.state is State.RESTARTING
        assert lifecycle.apply(record, FirstStep(time=0, attempt=1, step=1)).state is State.RUNNING

    def test_a_stop_shows_until_it_is_carried_out(self) -> None:
        stop = StopRequested(time=0, cause=StopCause.PREEMPTION, source="SIGTERM")
        record = lifecycle.fold([*running(), stop, snapshot(4), Progress(time=0, attempt=0, step=5)])
        assert record.state is State.STOPPING
        record = lifecycle.fold(
            [AttemptEnded(time=0, attempt=0, step=5, stopped=True), decided(Action.STOP)], record
        )
        assert (record.state, record.preemptions) == (State.PREEMPTED, 1)

    @pytest.mark.parametrize("state", State)
    def test_a_run_can_start_in_every_state(self, state: State) -> None:
        stop = StopRequested(time=0, cause=StopCause.USER, source="SIGINT")
        record = lifecycle.apply(JobRecord(state=state, epoch=3, stop=stop, attempt=5), run_started(epoch=4))
        assert (record.state, record.epoch, record.stop, record.attempt) == (State.STARTING, 4, None, 5)

    def test_every_fact_and_every_verdict_has_its_place(self) -> None:
        placed = {event for row in lifecycle.TRANSITIONS.values() for event in row}
        assert placed == (set(FACTS.values()) - {Decided}) | set(Action)
        assert set(lifecycle.TRANSITIONS) == set(State)

    def test_an_impossible_fact_is_refused_by_name_state_and_what_is_allowed(self) -> None:
        with pytest.raises(
            ProtocolError, match=r"^FirstStep cannot happen to a job that is new: allowed are .*RunStarted"
        ):
            lifecycle.apply(JobRecord(), FirstStep(time=0, attempt=0, step=1))
        with pytest.raises(
            ProtocolError, match=r"Decided\(restart\) .* stopping: allowed are .*Decided\(stop\)"
        ):
            lifecycle.apply(JobRecord(state=State.STOPPING), decided(Action.RESTART))

    def test_attempt_numbers_are_never_reused(self) -> None:
        record = lifecycle.fold([*running(), failed(0, 3), decided(Action.RESTART)])
        with pytest.raises(ProtocolError, match="attempt 0 after attempt 0.*the next is 1"):
            lifecycle.apply(record, AttemptStarted(time=0, attempt=0))

    def test_a_fact_of_another_attempt_is_refused(self) -> None:
        with pytest.raises(ProtocolError, match="Progress of attempt 4.*is at attempt 0"):
            lifecycle.fold([*running(), Progress(time=0, attempt=4, step=5)])


class TestBudget:
    def test_failures_add_up_without_progress(self) -> None:
        record = lifecycle.fold([*running(), failed(0, 3), decided(Action.RESTART)])
        record = lifecycle.fold([AttemptStarted(time=0, attempt=1), failed(1, 3)], record)
        assert record.failures_since_progress == 2

    def test_a_snapshot_further_than_ever_before_refills(self) -> None:
        record = lifecycle.fold([*running(), snapshot(2), failed(0, 3), decided(Action.RESTART)])
        again = [
            AttemptStarted(time=0, attempt=1),
            Resumed(time=0, attempt=1, step=2),
            FirstStep(time=0, attempt=1, step=3),
        ]
        record = lifecycle.fold(again, record)
        assert lifecycle.apply(record, snapshot(2, 1)).failures_since_progress == 1  # been there before
        assert lifecycle.apply(record, snapshot(3, 1)).failures_since_progress == 0

    def test_a_job_that_gave_up_starts_afresh_and_one_that_was_preempted_does_not(self) -> None:
        record = lifecycle.fold([*running(), failed(0, 3)])
        gave_up = lifecycle.fold([decided(Action.GIVE_UP), run_started(epoch=2)], record)
        stopped = lifecycle.fold([decided(Action.STOP), run_started(epoch=2)], record)
        assert (gave_up.failures_since_progress, stopped.failures_since_progress) == (0, 1)

    def test_a_failure_is_the_same_again_until_a_step_beyond_it_is_held(self) -> None:
        record = lifecycle.fold(
            [*running(), failed(0, 3), decided(Action.RESTART), AttemptStarted(time=0, attempt=1)]
        )
        for held in ([], [snapshot(2, 1)], [snapshot(3, 1)]):
            same = lifecycle.fold([*held, failed(1, 3)], record)
            assert same.last_failure is not None
            assert same.previous_fingerprint == same.last_failure.fingerprint
        assert lifecycle.fold([snapshot(4, 1), failed(1, 3)], record).previous_fingerprint is None

    def test_whoever_tries_again_after_it_gave_up_gets_a_first_failure(self) -> None:
        record = lifecycle.fold([*running(), failed(0, 3), decided(Action.GIVE_UP), run_started(epoch=2)])
        record = lifecycle.fold([AttemptStarted(time=0, attempt=1), failed(1, 3)], record)
        assert record.previous_fingerprint is None


class TestPoints:
    def test_a_snapshot_that_was_not_used_is_gone(self) -> None:
        record = lifecycle.fold([*running(), snapshot(4), failed(0, 6), decided(Action.RESTART)])
        record = lifecycle.fold([AttemptStarted(time=0, attempt=1)], record)
        ram = lifecycle.apply(record, Resumed(time=0, attempt=1, step=4, tier=Tier.RAM))
        disk = lifecycle.apply(record, Resumed(time=1, attempt=1, step=3, tier=Tier.CHECKPOINT, path="p"))
        assert ram.snapshot == record.snapshot
        assert disk.snapshot is None
        assert disk.checkpoint is not None
        assert (disk.checkpoint.step, disk.checkpoint.path) == (3, "p")

    def test_a_late_commit_does_not_replace_a_newer_one(self) -> None:
        def commit(step: int) -> CheckpointCommitted:
            return CheckpointCommitted(time=0, attempt=0, step=step, path=str(step), seconds=0, bytes=0)

        record = lifecycle.fold([*running(), commit(8), commit(5)])
        assert record.checkpoint is not None
        assert record.checkpoint.step == 8
        assert lifecycle.apply(record, CheckpointRejected(time=0, path="8", reason="torn")).checkpoint is None


class TestAnyJournal:
    @given(journals())
    def test_numbers_stay_within_their_bounds(self, facts: list[Fact]) -> None:
        record = JobRecord()
        for fact in facts:
            before, record = record, lifecycle.apply(record, fact)
            assert 0 <= record.spent.productive <= record.spent.supervised + 1e-6
            assert record.spent.supervised >= before.spent.supervised - 1e-6
            assert record.lost_steps >= before.lost_steps
            assert record.committed_step >= before.committed_step
            assert 0 <= record.stretch_seconds <= record.spent.productive + 1e-6
            assert record.furthest_step >= 0
            assert (
                min(record.failures_since_progress, record.preemptions_since_progress, record.restarts) >= 0
            )
            if isinstance(fact, Decided) and fact.action is Action.RESTART:
                assert record.failures_since_progress <= record.limits.max_failures
            by_user = (
                record.stop is not None and record.stop.cause is StopCause.USER
            )  # and limits may have shrunk
            if isinstance(fact, Decided) and fact.action is Action.STOP and not by_user:
                assert record.preemptions_since_progress <= record.limits.max_preemptions

    @given(journals(), st.data())
    def test_the_same_journal_gives_the_same_record_and_the_same_decisions(
        self, facts: list[Fact], data: st.DataObject
    ) -> None:
        cut = data.draw(st.integers(0, len(facts)))
        assert lifecycle.fold(facts[cut:], lifecycle.fold(facts[:cut])) == lifecycle.fold(facts)
        record = JobRecord()
        for fact, verdict in pairwise(facts):
            record = lifecycle.apply(record, fact)
            if isinstance(fact, AttemptEnded) and isinstance(verdict, Decided):
                if fact.failure is not None:
                    decision = restart.decide(record, fact.failure)
                elif record.stop is not None:
                    decision = restart.decide_stop(record, record.stop)
                else:
                    decision = restart.decide_finished(record)
                assert (decision.action, decision.reason, decision.delay) == (
                    verdict.action,
                    verdict.reason,
                    verdict.delay,
                )

    @given(journals(), st.data())
    def test_lost_lines_are_survived_and_named(self, facts: list[Fact], data: st.DataObject) -> None:
        kept = data.draw(st.lists(st.sampled_from(facts), max_size=30)) if facts else []
        record, problems = lifecycle.replay(kept)
        assert 0 <= record.spent.productive <= record.spent.supervised + 1e-6
        assert len(problems) <= len(kept)

    @given(journals())
    def test_a_run_that_ended_or_was_killed_can_be_taken_over(self, facts: list[Fact]) -> None:
        record = lifecycle.fold(facts)
        now = record.last_time or 0.0
        after = lifecycle.apply(record, run_started(now + 1e6, epoch=99))
        assert (after.state, after.epoch) == (State.STARTING, 99)
        assert after.spent.supervised == pytest.approx(record.spent.supervised)  # the gap is nobody's


def test_run_ended_keeps_the_state_and_says_how() -> None:
    record = lifecycle.fold(
        [*running(), decided(Action.STOP), RunEnded(time=3, exit_code=75, reason="saved")]
    )
    assert (record.state, record.exit_code, record.reason) == (State.PREEMPTED, 75, "saved")
    assert not record.supervised


def test_metrics_and_totals_accumulate() -> None:
    facts = [*running(total=10), Progress(time=1, attempt=0, step=2, metrics={"loss": 1.0})]
    record = lifecycle.fold([*facts, Progress(time=2, attempt=0, step=3, metrics={"accuracy": 0.5})])
    assert record.metrics == {"loss": 1.0, "accuracy": 0.5}
    assert (record.total_steps, record.step) == (10, 3)
    assert replace(record, metrics={}) != record
