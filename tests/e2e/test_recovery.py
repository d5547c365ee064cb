"""Killed in every basic way, at three moments each, and back to the same bits.

The moments: in the first step (nothing saved yet), in the middle, in the last step. A snapshot is taken every five steps
(one may be skipped while a slot is busy: steps here take milliseconds), so that a death loses some. After each run: exit code,
journal, status, the steps resumed from, the weights, no orphans.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from supervisor.model import (
    Action,
    AttemptEnded,
    Decided,
    FailureKind,
    Resumed,
    RunStarted,
    SnapshotCompleted,
    State,
)
from tests.e2e.conftest import STEPS
from tests.e2e.harness import Job, digests, torchrun

EVERY = 5
MOMENTS = (0, 17, STEPS - 1)
SNAPSHOTS = ("--snapshot-every", f"{EVERY}steps")


def faults(rank: int, **fault: object) -> list[dict[str, object]]:
    return [{"attempt": attempt, "rank": rank, "step": step, **fault} for attempt, step in enumerate(MOMENTS)]


def check_resumes(job: Job, moments: Sequence[int]) -> list[int]:
    """Each attempt resumed from the newest snapshot that was complete; where that was."""
    newest, resumes = 0, []
    for fact in job.facts():
        if isinstance(fact, SnapshotCompleted):
            newest = fact.step
        elif isinstance(fact, Resumed):
            # the journal may lag behind a supervisor that was killed, never the other way round
            assert newest <= fact.step
            resumes.append(newest := fact.step)
    assert resumes[0] == 0
    for moment, step in zip(moments, resumes[1:], strict=True):
        assert step % EVERY == 0
        assert step <= moment
    assert resumes[-1] > 0
    return resumes


def check_recovered(
    job: Job, out: Path, undisturbed: dict[str, str], kinds: set[FailureKind], rank: int | None
) -> None:
    record = job.record
    assert record.state is State.COMPLETED, job.output
    resumes = check_resumes(job, MOMENTS)
    failures = [fact.failure for fact in job.facts(AttemptEnded) if fact.failure]
    assert {failure.kind for failure in failures} == kinds, failures
    assert {failure.rank for failure in failures} == {rank}, failures
    assert record.restarts == len(MOMENTS)
    assert digests(out) == undisturbed
    status = job.status()
    assert status["state"] == "completed"
    assert status["step"] == status["total_steps"] == STEPS
    assert status["restarts"] == len(MOMENTS)
    assert status["last_failure"]["rank"] == rank  # type: ignore[index]
    assert status["checkpoint"]["step"] == STEPS  # type: ignore[index]
    for attempt in range(len(MOMENTS)):
        assert (job.folder / "attempts" / f"{attempt:06d}" / "failure.json").exists()
        for each in (0, 1):
            log = job.folder / "attempts" / f"{attempt:06d}" / "logs" / f"rank-{each}.log"
            assert f"rank {each} attempt {attempt} begins at step {resumes[attempt]}" in log.read_text()
    job.until_no_processes()
    assert not job.runtime.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(job: Job, tmp_path: Path, undisturbed: dict[str, str], rank: int) -> None:
    out = tmp_path / "out"
    code = job.run(torchrun("--out", out), *SNAPSHOTS, faults=faults(rank, kind="SIGKILL"))
    assert code == 0, job.output
    check_recovered(job, out, undisturbed, {FailureKind.CRASH}, rank)


def test_a_segmentation_fault(job: Job, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    out = tmp_path / "out"
    assert job.run(torchrun("--out", out), *SNAPSHOTS, faults=faults(1, kind="SIGSEGV")) == 0, job.output
    check_recovered(job, out, undisturbed, {FailureKind.CRASH}, 1)


def test_torchrun_killed(job: Job, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    out = tmp_path / "out"
    code = job.run(torchrun("--out", out), *SNAPSHOTS, faults=faults(0, kind="SIGKILL", target="torchrun"))
    assert code == 0, job.output
    check_recovered(job, out, undisturbed, {FailureKind.LAUNCHER}, None)


def test_an_exception(job: Job, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    out = tmp_path / "out"
    assert job.run(torchrun("--out", out), *SNAPSHOTS, faults=faults(1, kind="raise")) == 0, job.output
    check_recovered(job, out, undisturbed, {FailureKind.EXCEPTION}, 1)
    assert "scripted failure" in job.status()["last_failure"]["reason"]  # type: ignore[index]


def test_one_rank_leaves_with_code_zero(job: Job, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    out = tmp_path / "out"
    assert job.run(torchrun("--out", out), *SNAPSHOTS, faults=faults(1, kind="exit")) == 0, job.output
    check_recovered(job, out, undisturbed, {FailureKind.EARLY_EXIT}, 1)


def test_killed_during_a_save(job: Job, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """The save under way is lost, the one before it is whole."""
    out = tmp_path / "out"
    scripted: list[dict[str, object]] = [
        {"attempt": attempt, "rank": 1, "step": step, "kind": "kill-in-save"}
        for attempt, step in enumerate((3, 13, 23))
    ]
    assert job.run(torchrun("--out", out), *SNAPSHOTS, faults=scripted) == 0, job.output
    check_resumes(
        job, (4, 14, 24)
    )  # the saves that were died in are those of steps 5, 15 and 25, or later ones
    assert digests(out) == undisturbed
    assert all(f.failure.kind is FailureKind.CRASH for f in job.facts(AttemptEnded) if f.failure)


def test_the_supervisor_killed(job: Job, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Its workers die with it; the same command carries on from the snapshot in memory."""
    out = tmp_path / "out"
    scripted = faults(0, kind="SIGKILL", target="supervisor")
    for _ in MOMENTS:
        assert job.run(torchrun("--out", out), *SNAPSHOTS, faults=scripted) == -9
        job.until_no_processes()
        assert job.status()["state"] == "preempted"
    assert job.run(torchrun("--out", out), *SNAPSHOTS, faults=scripted) == 0, job.output
    check_resumes(job, MOMENTS)
    assert [fact.epoch for fact in job.facts(RunStarted)] == [1, 2, 3, 4]
    assert digests(out) == undisturbed
    assert not job.runtime.exists()


@pytest.mark.parametrize("script", ["bad_import.py", "bad_syntax.py"])
def test_a_program_that_cannot_start_is_not_tried_again(job: Job, tmp_path: Path, script: str) -> None:
    path = tmp_path / script
    path.write_text("import no_such_module_here\n" if script == "bad_import.py" else "def broken(:\n")
    assert job.run(torchrun(script=str(path))) == 1
    assert [fact.action for fact in job.facts(Decided)] == [Action.GIVE_UP]
    record = job.record
    assert record.state is State.FAILED
    assert record.last_failure is not None
    assert record.last_failure.kind is FailureKind.STARTUP
    assert ("no_such_module_here" if script == "bad_import.py" else "SyntaxError") in job.output


def test_the_same_exception_at_the_same_step_twice_is_deterministic(job: Job, tmp_path: Path) -> None:
    scripted: list[dict[str, object]] = [
        {"attempt": attempt, "rank": 0, "step": 8, "kind": "raise"} for attempt in range(9)
    ]
    assert job.run(torchrun("--out", tmp_path / "out"), *SNAPSHOTS, faults=scripted) == 1
    assert [fact.action for fact in job.facts(Decided)] == [Action.RESTART, Action.GIVE_UP]
    assert "twice" in job.record.reason  # type: ignore[operator]


def test_the_budget_is_spent_without_progress_and_refilled_by_it(job: Job, tmp_path: Path) -> None:
    """Five failures under a budget of two: four with progress between them, and then two without."""
    steps = (6, 11, 16, 17, 18)
    scripted: list[dict[str, object]] = [
        {"attempt": attempt, "rank": 0, "step": step, "kind": "SIGKILL"} for attempt, step in enumerate(steps)
    ]
    assert job.run(torchrun("--out", tmp_path / "out"), *SNAPSHOTS, "--max-failures", 2, faults=scripted) == 1
    actions = [fact.action for fact in job.facts(Decided)]
    assert actions == [Action.RESTART] * 4 + [Action.GIVE_UP]
    assert "--max-failures" in job.output
    # its newest state was made durable before it gave up, and the user may try again
    assert job.status()["checkpoint"]["step"] == 15  # type: ignore[index]
    assert job.run(torchrun("--out", tmp_path / "out"), *SNAPSHOTS) == 0, job.output
