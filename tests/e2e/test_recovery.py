"""Killed in every basic way, at three moments, and back to the same bits.

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
from tests.e2e.harness import Job, digests, python, torchrun

EVERY = 5
MOMENTS = (0, 17, STEPS - 1)
SNAPSHOTS = ("--snapshot-every", f"{EVERY}steps")


#: every basic way to die, as the script under test is told it, and what it must be taken for
WAYS: dict[str, tuple[dict[str, object], FailureKind]] = {
    "rank 0 killed": ({"rank": 0, "kind": "SIGKILL"}, FailureKind.CRASH),
    "rank 1 killed": ({"rank": 1, "kind": "SIGKILL"}, FailureKind.CRASH),
    "segmentation fault": ({"rank": 1, "kind": "SIGSEGV"}, FailureKind.CRASH),
    "torchrun killed": ({"rank": 0, "kind": "SIGKILL", "target": "torchrun"}, FailureKind.LAUNCHER),
    "exception": ({"rank": 1, "kind": "raise"}, FailureKind.EXCEPTION),
    "exit code 0": ({"rank": 1, "kind": "exit"}, FailureKind.EARLY_EXIT),
}
#: one job each, with a death at each of the moments (in other orders: benchmarks/soak.py)
LIVES = [
    ("exit code 0", "torchrun killed", "rank 0 killed"),
    ("segmentation fault", "rank 1 killed", "exception"),
]


def faults(*ways: str) -> list[dict[str, object]]:
    struck = zip(MOMENTS, ways, strict=True)
    return [{"attempt": attempt, "step": step, **WAYS[way][0]} for attempt, (step, way) in enumerate(struck)]


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


@pytest.mark.parametrize("life", LIVES, ids=", ".join)
def test_three_deaths(
    job: Job, tmp_path: Path, undisturbed: dict[str, str], life: tuple[str, str, str]
) -> None:
    out = tmp_path / "out"
    options = (*SNAPSHOTS, "--standby", "on")
    assert job.run(torchrun("--out", out), *options, faults=faults(*life)) == 0, job.output
    record = job.record
    assert record.state is State.COMPLETED, job.output
    resumes = check_resumes(job, MOMENTS)
    failures = [fact.failure for fact in job.facts(AttemptEnded) if fact.failure]
    assert [failure.kind for failure in failures] == [WAYS[way][1] for way in life], failures
    ranks = [None if way == "torchrun killed" else WAYS[way][0]["rank"] for way in life]
    assert [failure.rank for failure in failures] == ranks, failures
    assert record.restarts == len(MOMENTS)
    assert digests(out) == undisturbed
    status = job.status()
    assert status["state"] == "completed"
    assert status["step"] == status["total_steps"] == STEPS
    assert status["restarts"] == len(MOMENTS)
    assert status["last_failure"]["rank"] == ranks[-1]  # type: ignore[index]
    if life[-1] == "exception":
        assert "scripted failure" in status["last_failure"]["reason"]  # type: ignore[index]
    assert status["checkpoint"]["step"] == STEPS  # type: ignore[index]
    for attempt in range(len(MOMENTS)):
        assert (job.folder / "attempts" / f"{attempt:06d}" / "failure.json").exists()
        for each in (0, 1):
            log = job.folder / "attempts" / f"{attempt:06d}" / "logs" / f"rank-{each}.log"
            assert f"rank {each} attempt {attempt} begins at step {resumes[attempt]}" in log.read_text()
    job.until_no_processes()
    assert not job.runtime.exists()


def test_killed_during_a_save(job: Job, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """The one before it is whole."""
    out = tmp_path / "out"
    scripted: list[dict[str, object]] = [
        {"attempt": attempt, "rank": 1, "step": step, "kind": "kill-in-save"}
        for attempt, step in enumerate((3, 13, 23))
    ]
    assert job.run(torchrun("--out", out), *SNAPSHOTS, faults=scripted) == 0, job.output
    resumes = check_resumes(job, (5, 15, 25))  # the very save counts if the kill came when it was whole
    deaths = [fact.step for fact in job.facts(AttemptEnded) if fact.failure]
    assert deaths == [5, 15, 25], resumes
    assert digests(out) == undisturbed
    assert all(f.failure.kind is FailureKind.CRASH for f in job.facts(AttemptEnded) if f.failure)


def test_the_supervisor_killed(job: Job, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Its workers die with it; the same command carries on from the snapshot in memory."""
    out = tmp_path / "out"
    scripted: list[dict[str, object]] = [
        {"attempt": attempt, "rank": 0, "step": step, "kind": "SIGKILL", "target": "supervisor"}
        for attempt, step in enumerate(MOMENTS)
    ]
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
    assert job.run(python("--out", tmp_path / "out"), *SNAPSHOTS, faults=scripted) == 1
    assert [fact.action for fact in job.facts(Decided)] == [Action.RESTART, Action.GIVE_UP]
    assert "twice" in job.record.reason  # type: ignore[operator]


def test_the_budget_is_spent_without_progress_and_refilled_by_it(job: Job, tmp_path: Path) -> None:
    """Three failures under a budget of one: two with progress between them, and then one without."""
    steps = (6, 11, 12)
    scripted: list[dict[str, object]] = [
        {"attempt": attempt, "rank": 0, "step": step, "kind": "SIGKILL"} for attempt, step in enumerate(steps)
    ]
    assert job.run(python("--out", tmp_path / "out"), *SNAPSHOTS, "--max-failures", 1, faults=scripted) == 1
    actions = [fact.action for fact in job.facts(Decided)]
    assert actions == [Action.RESTART] * 2 + [Action.GIVE_UP]
    assert "--max-failures" in job.output
    # its newest state was made durable before it gave up, and the user may try again
    assert job.status()["checkpoint"]["step"] == 10  # type: ignore[index]
    assert job.run(python("--out", tmp_path / "out"), *SNAPSHOTS) == 0, job.output
