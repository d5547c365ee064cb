"""``everstep status`` and ``everstep checkpoints`` on a job that runs, on one that was killed, and on a finished one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from supervisor.model import AttemptStarted, CheckpointCommitted, FirstStep, StandbyReady
from tests.e2e import harness
from tests.e2e.conftest import STEPS
from tests.e2e.harness import Job, python, torchrun


def everstep(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *map(str, words)],
        cwd=harness.ROOT, env=harness.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def listed(job: Job, *options: object) -> list[dict[str, Any]]:
    result = everstep("checkpoints", "list", "--json", "--dir", job.folder, *options)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    assert all({"bytes", "created", "metrics", "path", "step", "verified"} <= set(one) for one in found)
    return found


def test_status_of_a_live_job_follows_it(job: Job, tmp_path: Path) -> None:
    job.start(
        torchrun("--out", tmp_path / "out", "--pause", "0.1"), "--snapshot-every", "2steps", "--checkpoint-every", "5steps",
        faults=[{"attempt": 0, "rank": 1, "step": 9, "kind": "SIGKILL"}],
    )  # fmt: skip
    job.until_fact(FirstStep)
    first = job.status()
    assert first["state"] in ("running", "restarting")
    assert first["total_steps"] == STEPS
    job.until_fact(FirstStep, lambda fact: fact.attempt == 1)
    assert not any(fact.standby for fact in job.facts(AttemptStarted)), "there is none"
    assert not job.facts(StandbyReady)
    job.until_fact(CheckpointCommitted, lambda fact: fact.step >= 10)
    second = job.status()
    assert second["state"] == "running"
    assert second["attempt"] == second["restarts"] == 1
    assert int(second["step"]) > int(first["step"])  # type: ignore[call-overload]
    failure = second["last_failure"]
    assert isinstance(failure, dict)
    assert (failure["kind"], failure["rank"], failure["attempt"]) == ("crash", 1, 0)
    for name in ("snapshot", "checkpoint"):
        point = second[name]
        assert isinstance(point, dict)
        assert point["step"] % (2 if name == "snapshot" else 5) == 0 or point["step"] % 5 == 0
        assert 0 <= point["age_s"] < 60
    memory = second["memory"]
    assert isinstance(memory, dict)
    assert memory["needed"] == 3 * memory["slot"] > 0
    assert memory["held"] + memory["on_disk"] > 0
    assert 0 < float(second["goodput"]) < 1  # type: ignore[arg-type]
    assert second["lost_steps"] in range(1, 10)
    steps = [one["step"] for one in listed(job)]
    assert steps == sorted(steps, reverse=True)
    assert "running" in everstep("status", "--dir", job.folder).stdout
    assert job.wait() == 0, job.output
    last = job.status()
    assert last["state"] == "completed"
    assert last["step"] == STEPS


def test_checkpoints_of_a_finished_job(job: Job, tmp_path: Path) -> None:
    options = (
        "--checkpoint-every",
        "5steps",
        "--keep-last",
        "4",
        "--keep-best",
        "loss:min:1",
    )
    assert job.run(python("--out", tmp_path / "out", "--pause", "0.05"), *options) == 0, job.output
    found = listed(job)
    assert [one["step"] for one in found][:4] == [30, 25, 20, 15]
    assert all(one["metrics"]["loss"] > 0 for one in found)
    verified = everstep("checkpoints", "verify", "--json", "--dir", job.folder)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    path = Path(found[1]["path"]) / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damaged = everstep("checkpoints", "verify", "--dir", job.folder)
    assert damaged.returncode == 1
    assert "__0_0.distcp" in damaged.stdout + damaged.stderr
    assert [one["verified"] for one in listed(job, "--verify")][:3] == [True, False, True]
    dry = everstep("checkpoints", "prune", "--keep-last", 1, "--dry-run", "--dir", job.folder)
    assert dry.returncode == 0, dry.stderr
    assert len(listed(job)) == len(found)
    assert everstep("checkpoints", "prune", "--keep-last", 1, "--dir", job.folder).returncode == 0
    assert 30 in [one["step"] for one in listed(job)]
    assert len(listed(job)) < len(found)


def test_watching_a_job_ends_with_it(job: Job, tmp_path: Path) -> None:
    job.start(python("--out", tmp_path / "out", "--pause", "0.1"))
    job.until_fact(FirstStep)
    watching = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "status", "--watch", "--dir", str(job.folder)],
        cwd=harness.ROOT, env=harness.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    out, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert b"preempted" in out
