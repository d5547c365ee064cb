"""``--standby init``: what a promoted standby has read and where it resumes is that of the moment it begins."""

from __future__ import annotations

import signal
from pathlib import Path

from supervisor.model import Resumed, SnapshotCompleted
from tests.e2e import harness
from tests.e2e.harness import Job, torchrun
from tests.e2e.test_standby import SNAPSHOTS, ready, recovered, workers

STANDBY = "on"
PROGRAM = str(harness.PROGRAMS / "ahead.py")


def fail(job: Job, attempt: int) -> None:
    """Kill a rank once its attempt has been snapshotted and the standby is ready."""
    ready(job, attempt + 1)
    since = job.record.failure_committed_step
    job.until_fact(SnapshotCompleted, lambda fact: fact.attempt == attempt and fact.step > since)
    workers(job, attempt)[1].kill()


def seen(job: Job, out: Path, attempt: int) -> list[str]:
    """What it has read, where it resumed and the count of restarts, the same on all ranks."""
    ranks = [
        job.until(lambda r=rank: ((p := out / f"seen-{attempt}-{r}").exists() and p.read_text()) or None)
        for rank in range(2)
    ]
    assert ranks[0] == ranks[1]
    return ranks[0].split()


def test_what_it_has_learned_is_of_the_moment_it_begins(job: Job, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("first")
    job.start(torchrun(tmp_path, ranks=2, script=PROGRAM), *SNAPSHOTS, "--standby", "init")
    assert seen(job, tmp_path, 0) == ["first", "0", "0"]

    fail(job, 0)
    recovered(job, 1, standby=True)
    assert "the standby has run ahead and waits in front of init_process_group" in job.output
    resumed = job.facts(Resumed)[-1].step
    assert resumed > 0
    assert seen(job, tmp_path, 1) == ["first", str(resumed), "1"]

    ready(job, 2)
    config.write_text("second")
    fail(job, 1)
    recovered(job, 2, standby=False)
    assert f"the standby is not used: it has read {config}, which changed since" in job.output
    assert seen(job, tmp_path, 2)[0] == "second"

    ready(job, 3)
    assert f"waits in front of reading {config}" in job.output
    config.write_text("third")
    fail(job, 2)
    recovered(job, 3, standby=True)
    assert seen(job, tmp_path, 3)[0] == "third"
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    job.until_no_processes()
    assert not job.runtime.exists()


def test_a_script_that_does_not_get_there_waits_before_it_begins(job: Job, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("first")
    job.start(torchrun(tmp_path, "--fail-ahead", ranks=2, script=PROGRAM), *SNAPSHOTS, "--standby", "init")
    fail(job, 0)
    recovered(job, 1, standby=True)
    assert "the next ones wait before the script begins" in job.output
    assert "has run ahead" not in job.output
    assert job.record.restarts == 1
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    job.until_no_processes()
