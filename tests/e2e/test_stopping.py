"""Asked to stop, in each way it can be asked: the state of an agreed step is saved, the exit code says what to do next."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from supervisor.model import FirstStep, Resumed, SnapshotCompleted, State, StopCause, WorkersReady
from tests.e2e.conftest import STEPS
from tests.e2e.harness import DEADLINE, PROGRAMS, Job, digests, environment, python, torchrun

SLOW = ("--pause", "0.05")


def stop(job: Job, how: str) -> None:
    assert job.process is not None
    if how == "tree":
        root = psutil.Process(job.process.pid)
        for process in [root, *root.children(recursive=True)]:
            process.send_signal(signal.SIGTERM)
    elif how == "ctrl-c":
        os.killpg(job.process.pid, signal.SIGINT)
    else:
        job.signal(signal.Signals[how])


@pytest.mark.parametrize(
    ("launch", "weights", "stops"),
    [
        pytest.param(torchrun, "undisturbed", (("ctrl-c", 130), ("tree", 75)), id="two ranks"),
        pytest.param(python, "alone", (("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75)), id="one"),
    ],
)
def test_each_stop_saves_and_the_same_command_carries_on(
    job: Job,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    launch: Callable[..., list[str]],
    weights: str,
    stops: tuple[tuple[str, int], ...],
) -> None:
    """Each as soon as its first step is seen, and so further on than the one before."""
    out, go = tmp_path / "out", tmp_path / "go"
    command = launch("--out", out, "--pause", "0.2", "--pause-until", go)
    resumed_from = []
    for attempt, (how, code) in enumerate(stops):
        job.start(command, "--snapshot-every", "never")
        first = job.until_fact(FirstStep, lambda fact, n=attempt: fact.attempt == n)
        stop(job, how)
        assert job.wait() == code, job.output
        record = job.record
        assert record.state is State.PREEMPTED
        assert record.stop is not None
        assert record.stop.cause is (StopCause.USER if how == "ctrl-c" else StopCause.PREEMPTION)
        assert record.checkpoint is not None
        assert record.checkpoint.step >= first.step
        assert job.status()["state"] == "preempted"
        resumed_from.append(record.checkpoint.step)
        job.until_no_processes()
        assert not job.runtime.exists()
        assert not out.exists(), "what follows the loop must not run as if the training had finished"
    go.touch()
    assert job.run(command) == 0, job.output
    assert [fact.step for fact in job.facts(Resumed)] == [0, *resumed_from]
    assert job.record.lost_steps == 0
    assert digests(out) == request.getfixturevalue(weights)


def test_a_signal_to_the_whole_tree_spares_the_data_loaders_workers(job: Job, tmp_path: Path) -> None:
    """torch would raise in the training loop, before the agreed save, were one of them to die of it."""
    script = str(PROGRAMS / "loader.py")
    out, plain, go = tmp_path / "out", tmp_path / "plain", tmp_path / "go"
    for attempt, method in enumerate(("fork", "spawn", "forkserver")):
        command = torchrun(
            "--out", out, "--method", method, "--pause", "0.2", "--pause-until", go, script=script, ranks=1
        )
        job.start(command, "--snapshot-every", "never")
        first = job.until_fact(FirstStep, lambda fact, n=attempt: fact.attempt == n)
        stop(job, "tree")
        assert job.wait() == 75, job.output
        assert job.record.checkpoint is not None
        assert job.record.checkpoint.step >= first.step
        job.until_no_processes()
    go.touch()
    assert job.run(command) == 0, job.output
    assert job.record.lost_steps == 0
    undisturbed = torchrun("--out", plain, "--no-session", script=script, ranks=1)
    undisturbed.insert(1, "--standalone")
    subprocess.run(undisturbed, env=environment(), check=True, timeout=DEADLINE, capture_output=True)
    assert digests(out) == digests(plain)


def test_a_stop_before_the_first_step_saves_nothing_and_comes_back(job: Job, tmp_path: Path) -> None:
    job.start(python("--out", tmp_path / "out"))
    job.until(lambda: job.folder.joinpath("job.json").exists() or None)  # type: ignore[type-var,arg-type]
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    job.until_no_processes()
    assert job.run(python("--out", tmp_path / "out")) == 0, job.output
    assert job.record.step == STEPS


def test_a_second_ctrl_c_stops_at_once(job: Job, tmp_path: Path) -> None:
    """Even when the workers cannot reach the step they were to save."""
    job.start(torchrun("--out", tmp_path / "out", "--pause", "1000"), "--grace", "10m")
    job.until_fact(WorkersReady)
    job.until(lambda: True if job.status()["world_size"] == 2 else None)  # type: ignore[type-var,arg-type,return-value]
    stop(job, "ctrl-c")
    job.until(lambda: True if "SIGINT" in job.output else None)  # type: ignore[type-var,arg-type,return-value]
    stop(job, "ctrl-c")
    assert job.wait(20) == 130, job.output
    job.until_no_processes()


def test_the_grace_period_ends_a_stop_that_cannot_be_carried_out(job: Job, tmp_path: Path) -> None:
    job.start(python("--out", tmp_path / "out", "--pause", "1000"), "--grace", "1s")
    job.until_fact(WorkersReady)
    job.signal(signal.SIGTERM)
    assert job.wait(30) == 75, job.output
    job.until_no_processes()


def test_two_supervisors_of_one_job(job: Job, tmp_path: Path, alone: dict[str, str]) -> None:
    """The second refuses and names the first, which goes on alone."""
    out = tmp_path / "out"
    first = job.start(python("--out", out, *SLOW), "--snapshot-every", "5steps")
    job.until_fact(SnapshotCompleted)
    second = Job(job.folder)
    assert second.run(python("--out", out)) == 78
    assert f"pid {first.pid}" in second.output
    assert job.wait() == 0, job.output
    assert digests(out) == alone


def test_a_finished_job_says_so(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert job.run(python("--out", out)) == 0, job.output
    facts = job.facts()
    assert job.run(python("--out", out)) == 0
    assert "finished" in job.output
    assert job.facts() == facts
    assert job.run(python("--out", out, "--steps", STEPS + 10), "--continue") == 0, job.output
    assert job.facts(Resumed)[-1].step == STEPS
    assert job.record.step == STEPS + 10
