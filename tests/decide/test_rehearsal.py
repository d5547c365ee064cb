"""When a fault may be rehearsed, and what a journal's facts tell of how it went."""

from __future__ import annotations

from dataclasses import replace

import pytest

from supervisor.decide import rehearsable, rehearsal
from supervisor.decide.rehearsal import ABOUT, Course, Kind, Report
from supervisor.model import (
    Action,
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRejected,
    Decided,
    Fact,
    Failure,
    FailureKind,
    FirstStep,
    Limits,
    Resumed,
    RunEnded,
    State,
    StopCause,
    StopRequested,
    Tier,
)
from supervisor.record import JobRecord, Point

RUNNING = JobRecord(
    state=State.RUNNING, attempt=3, host="here", world_size=2, attempt_first_time=5.0, resumed_step=100, step=140,
    snapshot=Point(step=130, time=9.0), limits=Limits(max_failures=2), last_time=10.0,
)  # fmt: skip
ENDS_ATTEMPT = [kind for kind in Kind if ABOUT[kind].taken_for is not None]


def refused(
    kind: Kind, record: JobRecord, *, alive: bool = True, host: str = "here", rank: int | None = None
) -> str:
    return rehearsable.refusal(kind, record, alive=alive, host=host, rank=rank, now=20.0) or ""


@pytest.mark.parametrize("kind", Kind)
def test_a_job_that_can_bear_it(kind: Kind) -> None:
    assert refused(kind, RUNNING) == ""
    assert (refused(kind, RUNNING, rank=1) == "") is ABOUT[kind].of_rank


@pytest.mark.parametrize("kind", Kind)
def test_what_is_senseless_is_refused(kind: Kind) -> None:
    assert "needs a live one" in refused(kind, RUNNING, alive=False)
    assert "runs on here, this is there" in refused(kind, RUNNING, host="there")
    assert "wait until it makes steps" in refused(kind, replace(RUNNING, attempt_first_time=None))
    assert "is stopping" in refused(kind, replace(RUNNING, state=State.STOPPING))
    if ABOUT[kind].of_rank:
        assert "ranks 0 to 1" in refused(kind, RUNNING, rank=2)
        assert "ranks 0 to 1" in refused(kind, RUNNING, rank=-1)


@pytest.mark.parametrize("kind", Kind)
def test_of_a_job_on_several_nodes_the_ranks_here_can_be_struck(kind: Kind) -> None:
    def refused_on(host: str, *here: int, rank: int | None = None) -> str:
        record = replace(RUNNING, world_size=4)
        why_not = rehearsable.refusal(kind, record, alive=True, host=host, rank=rank, now=20.0, here=here)
        return why_not or ""

    if kind is Kind.CORRUPT_CHECKPOINT:
        assert "for jobs on one node" in refused_on("here", 0, 1)
    elif ABOUT[kind].of_rank:
        assert (
            refused_on("here", 0, 1) == refused_on("there", 2, 3) == refused_on("there", 2, 3, rank=2) == ""
        )
        assert refused_on("there", 2, 3, rank=1).startswith("rank 1 is not on there, which has 2, 3")
        assert "no rank of the job runs on nowhere" in refused_on("nowhere")
        assert "ranks 0 to 3" in refused_on("there", 2, 3, rank=4)
    else:
        assert refused_on("here", 0, 1) == ""
        assert "leads the job, which is on here" in refused_on("there", 2, 3)


@pytest.mark.parametrize("kind", ENDS_ATTEMPT)
def test_no_job_is_lost_over_it(kind: Kind) -> None:
    assert "not survive it" in refused(kind, replace(RUNNING, failures_since_progress=2))
    assert "nothing was saved yet" in refused(kind, replace(RUNNING, snapshot=None))
    without_session = replace(RUNNING, snapshot=None, resumed_step=None)
    assert refused(kind, without_session) == ""


@pytest.mark.parametrize("kind", [kind for kind in ENDS_ATTEMPT if ABOUT[kind].inside])
def test_a_second_one_at_the_same_step_is_not_taken_for_proof(kind: Kind) -> None:
    taken_for = ABOUT[kind].taken_for
    assert taken_for is not None
    before = Failure(kind=taken_for, reason="", attempt=2, time=1.0, step=140, exception="raised, at 1.000")
    record = replace(RUNNING, failures_since_progress=1, last_failure=before)
    assert refused(kind, record) == ""
    verdict = rehearsable.foreseen(kind, record, 20.0)
    assert verdict is not None
    assert (verdict.action, verdict.delay) == (Action.RESTART, 1.0)


# --------------------------------------------------------------------------- the course


def told(course: Course, *facts: Fact, relieved: float | None = None) -> tuple[Report, bool]:
    for fact in facts:
        course = rehearsal.follow(course, fact)
        if course.refused is not None and course.relieved is None:
            course = replace(course, relieved=relieved)
    return rehearsal.report(course), rehearsal.is_over(course)


def failure(kind: FailureKind = FailureKind.CRASH) -> Failure:
    return Failure(kind=kind, reason="rank 1 was killed by SIGKILL", attempt=3, time=10.5, rank=1, step=142)


def ended(kind: FailureKind = FailureKind.CRASH) -> AttemptEnded:
    return AttemptEnded(time=10.75, attempt=3, step=142, failure=failure(kind), noticed=10.5)


AGAIN = (
    Decided(time=10.75, attempt=3, action=Action.RESTART, reason="restarting now: it died"),
    AttemptStarted(time=11.0, attempt=4, standby=True),
    Resumed(time=11.25, attempt=4, step=130, tier=Tier.RAM, path="/dev/shm/x/slots/1"),
    FirstStep(time=12.0, attempt=4, step=131, restore_seconds=0.25),
)
KILL = Course(kind=Kind.KILL_RANK, attempt=3, rank=1, struck=10.0)


def test_a_recovery_is_measured_from_the_fault() -> None:
    report, over = told(KILL, ended(), *AGAIN)
    assert over
    assert report.recovered
    assert (report.detection, report.teardown, report.pause) == (0.5, 0.25, 0.0)
    assert (report.relaunch, report.restore, report.total) == (1.0, 0.25, 2.0)
    assert (report.steps_lost, report.resumed_step, report.resumed_from) == (12, 130, "ram")
    assert (report.failure, report.as_expected, report.standby) == ("crash", True, True)


def test_it_is_not_over_before_a_step_and_what_was_before_is_not_counted() -> None:
    early = replace(ended(), time=9.0)
    course = rehearsal.follow(KILL, early)
    assert course == KILL
    for fact in (ended(), *AGAIN[:-1]):
        course = rehearsal.follow(course, fact)
        assert not rehearsal.is_over(course)
    late = rehearsal.report(course, "not in time")
    assert (late.recovered, late.result, late.total) == (False, "not in time", None)
    assert "attempt 4 was begun" in rehearsal.stage(course)


def test_another_attempt_that_fails_on_the_way_delays_it() -> None:
    second = replace(AGAIN[1], attempt=5, time=20.0)
    third = FirstStep(time=22.0, attempt=5, step=131)
    report, over = told(KILL, ended(), *AGAIN[:-1], replace(ended(), attempt=4, time=15.0), second, third)
    assert over
    assert (report.total, report.relaunch, report.detection) == (12.0, 2.0, 0.5)


def test_something_else_than_was_done() -> None:
    report, _ = told(KILL, ended(FailureKind.HOST_OOM), *AGAIN)
    assert (report.recovered, report.as_expected) == (True, False)


def test_a_job_that_gives_up_has_not_recovered() -> None:
    report, over = told(KILL, ended(), RunEnded(time=13.0, exit_code=1, reason="giving up: enough"))
    assert over
    assert (report.recovered, report.exit_code) == (False, 1)
    assert "giving up: enough" in report.result


def test_damage_must_be_noticed() -> None:
    course = replace(KILL, kind=Kind.CORRUPT_CHECKPOINT, damaged="/c/step-2")
    skipped = CheckpointRejected(time=11.1, path="/c/step-2", reason="digest")
    from_1, from_2, from_3 = (
        replace(AGAIN[2], step=n, tier=Tier.CHECKPOINT, path=f"/c/step-{n}") for n in (1, 2, 3)
    )
    report, _ = told(course, ended(), *AGAIN[:2], skipped, from_1, AGAIN[3])
    assert (report.recovered, report.rejected, report.resumed_from) == (True, ("/c/step-2",), "/c/step-1")
    report, _ = told(course, ended(), *AGAIN[:2], from_2, AGAIN[3])
    assert not report.recovered
    assert "was not noticed" in report.result
    report, _ = told(course, ended(), *AGAIN[:2], from_3, AGAIN[3])
    assert "try again" in report.result


def test_an_attempt_that_fails_after_its_first_step_is_no_recovery() -> None:
    again = AttemptEnded(time=12.5, attempt=4, step=131, failure=failure(), noticed=12.25)
    report, over = told(KILL, ended(), *AGAIN, again)
    assert over
    assert (report.recovered, report.detection, report.total) == (False, 0.5, 2.0)
    assert report.result == "it came back, and then rank 1 was killed by SIGKILL"


DISK = Course(kind=Kind.FULL_DISK, attempt=3, struck=10.0)
REFUSED = CheckpointFailed(time=11.0, step=150, reason="No space left on device")


def committed(time: float, step: int) -> CheckpointCommitted:
    return CheckpointCommitted(time=time, attempt=3, step=step, path=f"/c/{step}", seconds=1, bytes=1)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else() -> None:
    report, over = told(DISK, committed(10.5, 140), REFUSED, relieved=11.5)
    assert not over  # one that was under way before has nothing to say
    report, over = told(DISK, REFUSED, committed(13.5, 160), relieved=11.5)
    assert over
    assert (report.recovered, report.detection, report.total, report.steps_lost) == (True, 1.0, 2.0, 0)
    report, _ = told(DISK, REFUSED, ended(FailureKind.STORAGE), committed(13.5, 160), relieved=11.5)
    assert not report.recovered
    assert "did not go on" in report.result


def test_a_notice_ends_the_run_in_order() -> None:
    course = Course(kind=Kind.NOTICE, attempt=3, struck=10.0)
    facts = (
        StopRequested(time=10.25, cause=StopCause.PREEMPTION, source="SIGUSR1"),
        AttemptEnded(time=11.0, attempt=3, step=145, stopped=True),
        committed(11.5, 145),
        Decided(time=11.75, attempt=3, action=Action.STOP, reason="preempted"),
    )
    report, over = told(course, *facts, RunEnded(time=12.0, exit_code=75, reason="preempted"))
    assert over
    assert (report.recovered, report.detection, report.teardown, report.total) == (True, 0.25, 1.75, 2.0)
    assert (report.steps_lost, report.exit_code) == (0, 75)
    report, _ = told(course, *facts, RunEnded(time=12.0, exit_code=1, reason="giving up"))
    assert not report.recovered
