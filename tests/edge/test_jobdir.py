"""Who may use a job directory, and what is said to the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.edge import runtimes
from supervisor.edge.jobdir import JobDirectory
from supervisor.errors import JobError, StorageError

ROOT = Path(__file__).parent.parent.parent


def test_one_holder_at_a_time_across_processes(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path / "deep" / "job")
    code = (
        "import sys; from pathlib import Path; from supervisor.edge.jobdir import JobDirectory\n"
        "with JobDirectory(Path(sys.argv[1])).claim(): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(job.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(JobError, match=rf"in use: everstep run, pid {holder.pid} on "), job.claim():
        pass
    holder.kill()  # however it dies
    holder.wait()
    with job.claim():
        assert f"pid {os.getpid()}" in (job.path / "lock").read_text()


def test_epochs_grow_and_an_older_owner_is_fenced(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path / "job")
    with job.claim():
        first = job.open_epoch("train.py", ["torchrun", "train.py"])
        job.fence(first.epoch)
        second = job.open_epoch("train.py", ["torchrun", "train.py", "--lr", "1"])
        assert (first.epoch, second.epoch) == (1, 2)
        assert first.run_id == second.run_id
        with pytest.raises(StorageError, match="newer supervisor"):
            job.fence(first.epoch)
        job.fence(second.epoch)
    runtime = Path(second.runtime)
    assert runtime.stat().st_mode & 0o777 == 0o700
    runtimes.remove(runtime)


def test_another_script_is_refused_by_name(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path / "job")
    with job.claim():
        file = job.open_epoch("train.py", [])
        with pytest.raises(JobError, match=r"holds the job of train\.py, not of other\.py"):
            job.open_epoch("other.py", [])
    runtimes.remove(Path(file.runtime))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}'])
def test_a_job_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    job = JobDirectory(tmp_path)
    job.file.write_text(content)
    with pytest.raises(JobError, match="not a job file"):
        job.read()


def test_a_newer_job_file_is_refused_with_both_versions(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path)
    job.file.write_text(json.dumps({"format": 9}))
    with pytest.raises(JobError, match=r"format 9, this one knows 1"):
        job.read()


def test_a_place_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, said in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "job", "Not a directory")):
        with pytest.raises(JobError, match=said), JobDirectory(path).claim():
            pass
    with pytest.raises(JobError, match="/proc/everstep"), JobDirectory(Path("/proc/everstep")).claim():
        pass
