"""What lies around a job: copies of its directory, full memory, other processes, a script that is not ready yet."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from supervisor.model import CheckpointCommitted, Resumed, SnapshotCompleted
from tests.e2e import harness
from tests.e2e.conftest import STEPS
from tests.e2e.harness import Job, digests, python, torchrun

SNAPSHOTS = ("--snapshot-every", "5steps", "--checkpoint-every", "5steps")


def test_a_copy_of_a_running_jobs_directory_is_a_job_of_its_own(
    job: Job, tmp_path: Path, alone: dict[str, str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    job.start(
        python("--out", first, "--pause", "0.3"), *SNAPSHOTS,
        faults=[{"attempt": 0, "rank": 0, "step": 22, "kind": "SIGKILL"}],
    )  # fmt: skip
    job.until_fact(CheckpointCommitted)
    shutil.copytree(job.folder, tmp_path / "copy")
    with harness.job(tmp_path / "copy") as copy:
        assert copy.run(python("--out", second), *SNAPSHOTS) == 0, copy.output
        assert copy.facts(Resumed)[-1].step >= 5
        assert digests(second) == alone
        assert copy.folder.joinpath("job.json").read_text() != job.folder.joinpath("job.json").read_text()
    assert job.wait() == 0, job.output
    assert digests(first) == alone


def run_in_little_memory(tmp_path: Path, left: str, ballast: int) -> str:
    """Run to the end where /dev/shm is large enough to be chosen, but has only ``left`` left; what was said."""
    folder = tmp_path / "job"
    script = (
        "mount -t tmpfs -o size=520m tmpfs /dev/shm && fallocate -l 520m /dev/shm/ballast && "
        f'truncate -s -{left} /dev/shm/ballast && exec "$@"'
    )
    argv = [
        *harness.RUN, "--dir", str(folder), *SNAPSHOTS,
        *torchrun("--out", tmp_path / "out", "--ballast", ballast),
    ]  # fmt: skip
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *argv], cwd=harness.ROOT, capture_output=True, text=True, check=False,
        env={**harness.environment(), "TMPDIR": str(tmp_path)}, timeout=harness.DEADLINE,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / "checkpoints" / f"step-{STEPS:09d}" / "everstep.json").exists()
    assert not list(tmp_path.glob("everstep-*"))
    return result.stderr


def test_full_memory_moves_the_snapshots_to_disk(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    said = run_in_little_memory(tmp_path, "100K", 1 << 20)
    assert said.count("from now on") == 1, said
    assert "failed: " in said
    assert digests(tmp_path / "out") == undisturbed


def test_memory_for_two_snapshots_of_three(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Known after the first: the third goes to disk before it is tried."""
    said = run_in_little_memory(tmp_path, "20M", 4 << 20)
    assert said.count("from now on") == 1, said
    assert "memory has no room for 3 snapshots" in said, said
    assert "failed" not in said, said
    assert digests(tmp_path / "out") == undisturbed


def test_a_program_beside_us_is_not_touched(job: Job, tmp_path: Path) -> None:
    """``sidecar & exec everstep run …``, the way containers start."""
    marker = tmp_path / "pid"
    argv = [
        *harness.RUN, "--dir", str(job.folder), *SNAPSHOTS,
        *python("--out", tmp_path / "out"),
    ]  # fmt: skip
    faults = [{"attempt": 0, "rank": 0, "step": 9, "kind": "SIGKILL"}]
    result = subprocess.run(
        ["sh", "-c", f'sleep 300 & echo $! > {marker}; exec "$@"', "sh", *argv], cwd=harness.ROOT,
        env=harness.environment(faults), stdout=subprocess.DEVNULL, timeout=harness.DEADLINE, check=False,
    )  # fmt: skip
    assert result.returncode == 0
    assert job.record.restarts == 1
    os.kill(int(marker.read_text()), signal.SIGKILL)  # ProcessLookupError: it was killed


def test_orphans_that_ended_are_reaped_during_the_attempt(job: Job) -> None:
    assert job.run([sys.executable, str(harness.PROGRAMS / "litter.py")]) == 0, job.output
    assert "zombies: 0" in job.output


def test_a_stop_before_the_session_is_carried_out_as_soon_as_there_is_one(job: Job, tmp_path: Path) -> None:
    go = tmp_path / "go"
    job.start([sys.executable, str(harness.PROGRAMS / "setup_handler.py"), str(go)], "--grace", "60s")
    job.until(lambda: "setting up" in job.output or None)
    job.signal(signal.SIGTERM)
    job.until(lambda: "heard SIGTERM" in job.output or None)
    go.touch()
    assert job.wait(60) == 75, job.output
    assert job.facts(SnapshotCompleted)
    assert job.record.checkpoint is not None


def test_checkpoints_that_were_deleted_are_not_believed_in(job: Job, tmp_path: Path) -> None:
    """A later give-up must still secure what the new run has done."""
    assert job.run(python("--out", tmp_path / "out"), *SNAPSHOTS) == 0, job.output
    shutil.rmtree(job.folder / "checkpoints")
    faults = [{"attempt": attempt, "rank": 0, "step": 12, "kind": "SIGKILL"} for attempt in (1, 2)]
    options = (
        "--snapshot-every",
        "5steps",
        "--checkpoint-every",
        "never",
        "--max-failures",
        "0",
        "--continue",
    )
    assert job.run(python("--out", tmp_path / "out"), *options, faults=faults) == 1, job.output
    assert job.facts(Resumed)[-1].step == 0
    checkpoint = job.record.checkpoint
    assert checkpoint is not None
    assert 5 <= checkpoint.step <= 10
    assert (job.folder / "checkpoints" / f"step-{checkpoint.step:09d}" / "everstep.json").exists()
