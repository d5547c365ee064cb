"""What was committed is not lost: supervisors killed at work, disks that fill up, clocks that jump."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.model import CheckpointCommitted, Resumed, SnapshotCompleted, State, Tier
from tests.e2e import harness
from tests.e2e.conftest import STEPS
from tests.e2e.harness import Job, digests, python, torchrun

SNAPSHOTS = ("--snapshot-every", "1step", "--checkpoint-every", "5steps")
SLOW = ("--checkpoint-bandwidth", "2MB")
LARGE = ("--ballast", 2 << 20)


@pytest.mark.parametrize("memory", ["kept", "lost"])
def test_the_supervisor_killed_in_the_middle_of_a_drain(
    job: Job, tmp_path: Path, alone: dict[str, str], memory: str
) -> None:
    out = tmp_path / "out"
    job.start(python("--out", out, *LARGE, "--pause", "0.3"), *SNAPSHOTS, *SLOW)
    first = job.until_fact(CheckpointCommitted)
    job.until(lambda: _unfinished(job) or None)
    job.signal(signal.SIGKILL)
    assert job.wait() == -9
    job.until_no_processes()
    assert _unfinished(job), "it was killed in a drain"
    newest = max(fact.step for fact in job.facts(SnapshotCompleted))
    if memory == "lost":
        shutil.rmtree(job.runtime)
    assert job.run(python("--out", out, *LARGE), *SNAPSHOTS) == 0, job.output
    resumed = job.facts(Resumed)[-1]
    if memory == "kept":
        assert resumed.tier is Tier.RAM
        assert newest <= resumed.step < STEPS
    else:
        assert resumed.tier is Tier.CHECKPOINT
        assert resumed.step == first.step
    assert digests(out) == alone
    assert not _unfinished(job)


def _unfinished(job: Job) -> list[Path]:
    return [path.parent for path in job.folder.glob("checkpoints/step-*/everstep.json.partial")]


def test_the_supervisor_killed_in_the_middle_of_a_snapshot(
    job: Job, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    out = tmp_path / "out"
    faults = [{"attempt": 0, "rank": 1, "step": 13, "kind": "kill-in-save", "target": "supervisor"}]
    assert job.run(torchrun("--out", out, *LARGE), *SNAPSHOTS, faults=faults) == -9, job.output
    job.until_no_processes()
    assert job.run(torchrun("--out", out, *LARGE), *SNAPSHOTS) == 0, job.output
    assert job.facts(Resumed)[-1].tier is Tier.RAM
    assert job.facts(Resumed)[-1].step > 0
    assert digests(out) == undisturbed


@pytest.mark.parametrize("seconds", [-86_400.0, 40_000_000.0], ids=["back", "forward"])
def test_a_wall_clock_that_jumps(job: Job, tmp_path: Path, alone: dict[str, str], seconds: float) -> None:
    """Of each jump back to the right time, the other half."""
    out = tmp_path / "out"
    faults = [{"attempt": 0, "rank": 0, "step": 17, "kind": "SIGKILL"}]
    argv = [
        sys.executable, str(harness.PROGRAMS / "jumpy.py"), str(seconds), "run", "--dir", str(job.folder),
        *SNAPSHOTS, "--standby", "off", "--keep-last", "2", *python("--out", out),
    ]  # fmt: skip
    result = subprocess.run(
        argv, cwd=harness.ROOT, env=harness.environment(faults), capture_output=True, text=True,
        timeout=harness.DEADLINE, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert digests(out) == alone
    record = job.record
    assert record.state is State.COMPLETED
    assert record.restarts == 1
    assert record.checkpoint is not None
    assert record.checkpoint.step == STEPS
    assert 0 < job.facts(Resumed)[-1].step <= 17
    committed = sorted(fact.step for fact in job.facts(CheckpointCommitted))
    left = sorted(int(path.name[5:]) for path in (job.folder / "checkpoints").iterdir())
    assert left == committed[-2:]
    assert job.status()["goodput"] <= 1  # type: ignore[operator]


def test_a_disk_that_others_fill(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """64 MB for the job's directory. Training goes on; with room again, the next run saves what lies in memory."""
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    command = [*namespace, sys.executable, "-m", "tests.e2e.programs.filling", str(tmp_path)]
    run = subprocess.run(
        command, cwd=harness.ROOT, capture_output=True, text=True, timeout=harness.DEADLINE, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert digests(tmp_path / "out") == undisturbed
    # buffers that DDP would take from rank 0 in the next step are rank 0's at once
    assert digests(tmp_path / "again")["digest-0"] == undisturbed["digest-0"]
