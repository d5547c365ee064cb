from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import restart, rollback
from supervisor.decide.guard import GuardPolicy, Watch
from supervisor.decide.rollback import LEVELS_APART, PASSED
from supervisor.model import (
    Action,
    Failure,
    FailureKind,
    Limits,
    Skip,
    StopCause,
    StopRequested,
    TroubleKind,
    Verdict,
)
from supervisor.record import JobRecord, Point

ON = Limits(guard="nan", guard_times=3)


def failure(step: int | None, good: int | None = None, *, kind: FailureKind = FailureKind.NUMERIC) -> Failure:
    return Failure(kind=kind, reason="loss is nan", attempt=4, time=0, step=step, good=good)


def jump(step: int) -> Failure:
    return replace(failure(step, step - 1), reason="loss has jumped", trouble=TroubleKind.SPIKE)


def record(
    *durable: int, resumed: int | None = 0, snapshot: int | None = None, limits: Limits = ON
) -> JobRecord:
    point = None if snapshot is None else Point(step=snapshot, time=0)
    return JobRecord(
        durable=durable, resumed_step=resumed, snapshot=point, limits=limits, failures_since_progress=1
    )


def bad_from(before: JobRecord, wrong: Failure) -> int:
    planned = rollback.plan(before, wrong)
    assert planned is not None
    return planned.bad_from


def rolled_back(before: JobRecord, wrong: Failure, resumed: int, durable: tuple[int, ...]) -> JobRecord:
    """The record when the attempt after a rollback has come to trouble again."""
    verdict = restart.decide(before, wrong)
    assert verdict.action is Action.ROLL_BACK, verdict
    after = rollback.carry_out(
        before.with_(last_failure=wrong), verdict.rollback, verdict.skip, verdict.level
    )
    return after.with_(resumed_step=resumed, durable=durable)


class TestWhereTo:
    def test_what_lies_beyond_the_last_good_number_is_bad(self) -> None:
        assert bad_from(record(60, 90, 120), failure(123, 122)) == 123
        assert bad_from(record(60, 90, 120), failure(123, 100)) == 101

    def test_a_state_that_showed_nothing_good_is_not_gone_back_to(self) -> None:
        assert bad_from(record(60, 90, 120, resumed=120), failure(121, None)) == 120

    def test_unless_there_is_no_other(self) -> None:
        assert bad_from(record(120, resumed=120), failure(121, None)) == 121

    def test_a_job_that_began_with_it_begins_again(self) -> None:
        verdict = restart.decide(record(), failure(3, 2))
        assert verdict.action is Action.ROLL_BACK
        assert bad_from(record(), failure(0, None)) == 1

    def test_each_repetition_goes_further_back(self) -> None:
        wrong = failure(123, 122)
        again = rolled_back(record(30, 60, 90, 120), wrong, 120, (30, 60, 90, 120))
        assert bad_from(again, wrong) == 91
        thrice = rolled_back(again, wrong, 90, (30, 60, 90))
        assert bad_from(thrice, wrong) == 61
        twice = replace(again.limits, guard_back=2)
        assert bad_from(again.with_(limits=twice), wrong) == 61

    def test_not_further_than_there_are_states(self) -> None:
        wrong = failure(123, 122)
        again = rolled_back(record(120, resumed=100), wrong, 120, (120,))
        assert bad_from(again, wrong) == 123

    def test_a_snapshot_is_a_state_too(self) -> None:
        assert bad_from(record(60, snapshot=90, resumed=60), failure(91, None)) == 61

    def test_states_that_learned_from_what_is_left_out_are_bad(self) -> None:
        skip = replace(ON, guard_skip=50)
        assert bad_from(record(60, 90, 120, limits=skip), failure(123, 122)) == 75
        planned = rollback.plan(record(90, 120, resumed=90, limits=skip), failure(123, 122))
        assert planned is not None
        assert (planned.bad_from, planned.skip) == (91, Skip(first=90, stop=124))


class TestVerdict:
    def test_it_is_limited(self) -> None:
        wrong = failure(123, 122)
        now = record(120)
        for _ in range(3):
            now = rolled_back(now, wrong, 120, (120,))
        verdict = restart.decide(now, wrong)
        assert verdict.action is Action.GIVE_UP
        assert "3 rollbacks did not get past it" in verdict.reason

    def test_getting_well_past_the_trouble_gives_a_fresh_budget(self) -> None:
        now = rolled_back(record(120), failure(123, 122), 120, (120,))
        assert restart.decide(now, failure(500, 123 + PASSED)).rollback == 1
        assert restart.decide(now, failure(500, 122 + PASSED)).rollback == 2

    def test_two_troubles_in_turns_are_not_each_others_progress(self) -> None:
        now = record(10)
        for step in (20, 200, 20):
            now = rolled_back(now, failure(step, step - 1), 10, (10,))
        assert restart.decide(now, failure(200, 199)).rollback == 3

    def test_a_jump_that_comes_again_each_time_is_accepted(self) -> None:
        now = record(120, 90)
        for _ in range(3):
            now = rolled_back(now, jump(123), 120, (90, 120))
            assert now.levels == ()
        verdict = restart.decide(now, jump(123))
        assert (verdict.action, verdict.level) == (Action.ROLL_BACK, 123)
        assert (
            "to go on with the new level: loss has jumped; 3 rollbacks did not get past it" in verdict.reason
        )
        assert bad_from(now, jump(123)) == 123, "no further back: the state was not to blame"
        accepted = rolled_back(now, jump(123), 120, (90, 120))
        assert accepted.levels == (123,)

    def test_what_jumps_again_soon_diverges_and_is_given_up(self) -> None:
        now = record(120).with_(levels=(123,))
        step = 123 + LEVELS_APART
        for _ in range(3):
            now = rolled_back(now, jump(step), 120, (120,))
        verdict = restart.decide(now, jump(step))
        assert verdict.action is Action.GIVE_UP
        assert "the jump in step 123 was accepted already" in verdict.reason
        assert restart.decide(now, jump(step + 1)).level == step + 1

    def test_a_level_is_accepted_of_a_jump_alone(self) -> None:
        now = record(120)
        for _ in range(3):
            now = rolled_back(now, jump(123), 120, (120,))
        assert restart.decide(now, replace(jump(123), trouble=TroubleKind.NAN)).action is Action.GIVE_UP
        raised = replace(jump(123), trouble=None, exception="FloatingPointError: loss is nan")
        assert restart.decide(now, raised).action is Action.GIVE_UP
        none = replace(ON, guard_times=0)
        assert restart.decide(record(120, limits=none), jump(123)).action is Action.GIVE_UP

    def test_nothing_more_is_left_out_for_a_level(self) -> None:
        now = record(60, limits=replace(ON, guard_skip=4))
        for _ in range(3):
            now = rolled_back(now, jump(123), 60, (60,))
        verdict = restart.decide(now, jump(123))
        assert (verdict.level, verdict.skip) == (123, None)

    def test_the_window_doubles(self) -> None:
        limits = replace(ON, guard_skip=4)
        now = record(60, limits=limits)
        assert restart.decide(now, failure(123, 122)).skip == Skip(first=120, stop=124)
        now = rolled_back(now, failure(123, 122), 60, (60,))
        assert restart.decide(now, failure(125, 119)).skip == Skip(first=118, stop=126)

    def test_a_stop_comes_first(self) -> None:
        stop = StopRequested(time=0, cause=StopCause.PREEMPTION, source="SIGTERM")
        assert restart.decide(record(120).with_(stop=stop), failure(123, 122)).action is Action.STOP

    def test_only_where_the_guard_is_on_and_there_is_a_session(self) -> None:
        assert rollback.plan(record(120, limits=Limits()), failure(123, 122)) is None
        assert rollback.plan(record(120, resumed=None), failure(123, 122)) is None
        assert rollback.plan(record(120), failure(123, 122, kind=FailureKind.CRASH)) is None

    def test_a_numeric_exception_of_the_script_is_one_too(self) -> None:
        raised = replace(failure(123), exception="FloatingPointError: loss is nan")
        assert bad_from(record(120), raised) == 123

    @given(
        st.sets(st.integers(0, 300), max_size=6), st.integers(0, 300), st.integers(-1, 300), st.integers(0, 300),
        st.integers(0, 4), st.integers(0, 300), st.integers(0, 20), st.integers(1, 3),
    )  # fmt: skip
    def test_it_is_the_same_before_and_after_the_states_were_condemned(
        self,
        durable: set[int],
        step: int,
        good: int,
        resumed: int,
        times: int,
        trouble: int,
        skip: int,
        back: int,
    ) -> None:
        """The journal has the condemnation before the verdict; and a state that can be used is always left, if there was one."""
        wrong = failure(step, min(good, step - 1) if good >= 0 else None)
        limits = replace(ON, guard_skip=skip, guard_back=back)
        now = record(*sorted(durable), resumed=min(resumed, step), limits=limits)
        now = now.with_(rollbacks_in_a_row=times, trouble_step=trouble if times else None)
        planned = rollback.plan(now, wrong)
        assert planned is not None
        after = rollback.condemn(now, wrong.attempt, planned.bad_from)
        one, other = restart.decide(now, wrong), restart.decide(after, wrong)
        assert (one.action, one.skip, one.rollback) == (other.action, other.skip, other.rollback)
        usable = [state for state in durable if state <= step]
        assert all(state < planned.bad_from for state in after.durable)
        assert after.durable or not usable or not min(resumed, step)
        if one.skip is not None:
            assert one.skip.first <= step < one.skip.stop


def lived(loss: Callable[[int], float], steps: int) -> tuple[list[Verdict], JobRecord]:
    """Verdicts on a training with a checkpoint after every 60 steps, until it has its steps or is given up."""
    now, verdicts = record(limits=replace(ON, guard="spike")), []
    for number in range(50):
        watch = Watch(GuardPolicy(mode="spike"), rollback.known(now))
        now = now.with_(resumed_step=max(now.durable, default=0))
        for step in range(now.resumed_step or 0, steps):
            if (found := watch.loss(step, loss(step))) is not None:
                break
            if (step + 1) % 60 == 0:
                now = now.with_(durable=(*now.durable, step + 1))
        else:
            return verdicts, now
        wrong = replace(jump(found.step), attempt=number, good=watch.good, limit=found.limit)
        planned = rollback.plan(now, wrong)
        assert planned is not None
        now = rollback.condemn(now, number, planned.bad_from).with_(last_failure=wrong)
        verdicts.append(restart.decide(now, wrong))
        if not verdicts[-1].action.goes_on:
            return verdicts, now
        now = rollback.carry_out(now, verdicts[-1].rollback, verdicts[-1].skip, verdicts[-1].level)
    raise AssertionError("it goes round and round")


class TestLives:
    def test_a_loss_with_a_new_level_comes_to_its_end(self) -> None:
        verdicts, now = lived(lambda step: 2.0 + (30.0 if step >= 417 else 0.0) + step % 7 / 100, 3000)
        assert [verdict.level for verdict in verdicts] == [None, None, None, 417]
        assert now.levels == (417,)

    def test_a_loss_that_diverges_is_given_up(self) -> None:
        verdicts, now = lived(lambda step: 2.0 * 3.0 ** max(0, (step - 200) // 100) + step % 7 / 100, 3000)
        assert verdicts[-1].action is Action.GIVE_UP
        assert len(now.levels) == 1
        assert len(verdicts) == 8


class TestSkips:
    windows = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8)

    @given(windows)
    def test_merged_windows_leave_out_the_same_steps(self, windows: list[tuple[int, int]]) -> None:
        skips: tuple[Skip, ...] = ()
        for first, length in windows:
            skips = rollback.leave_out(skips, Skip(first=first, stop=first + length))
        left_out = {step for first, length in windows for step in range(first, first + length)}
        assert {step for skip in skips for step in range(skip.first, skip.stop)} == left_out

    @given(windows, st.integers(0, 80))
    def test_no_save_is_proposed_where_ranks_jump(self, windows: list[tuple[int, int]], step: int) -> None:
        """Ranks look for a save point after each step they run: a proposal must be for such a number of steps."""
        skips: tuple[Skip, ...] = ()
        for first, length in windows:
            skips = rollback.leave_out(skips, Skip(first=first, stop=first + length))
        looked: list[int] = []
        completed = 0
        while completed < 100:
            skip = next((one for one in skips if one.first <= completed < one.stop), None)
            completed = completed + 1 if skip is None else skip.stop
            if skip is None:
                looked.append(completed)
        proposed = rollback.past(step, skips)
        assert proposed >= step
        assert proposed in looked or proposed == 0
