"""Who may use a job directory, and what is said to the others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supervisor.edge import jobdir
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
    jobdir.remove_runtime(runtime)


def test_another_script_is_refused_by_name(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path / "job")
    with job.claim():
        file = job.open_epoch("train.py", [])
        with pytest.raises(JobError, match=r"holds the job of train\.py, not of other\.py"):
            job.open_epoch("other.py", [])
    jobdir.remove_runtime(Path(file.runtime))


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


def test_runtimes_of_jobs_that_are_gone_are_swept_and_others_kept(tmp_path: Path) -> None:
    root = tmp_path / "everstep"
    jobs = {name: JobDirectory(tmp_path / name) for name in ("mine", "gone", "moved", "there")}
    for name, job in jobs.items():
        runtime = root / name
        runtime.mkdir(parents=True)
        (runtime / "job").write_text(str(job.path))
        if name != "gone":
            job.path.mkdir()
            elsewhere = runtime if name != "moved" else root / "elsewhere"
            job.file.write_text(json.dumps(dict(
                run_id="a", runtime=str(elsewhere), epoch=1, identity="x", command=[], created=0.0, format=1
            )))  # fmt: skip
    for name, hours in (("not ours", 0), ("forgotten", 2), ("not empty", 2)):
        (root / name).mkdir()
        (root / name / "file").write_text("") if name == "not empty" else None
        os.utime(root / name, 2 * (time.time() - hours * 3600,))
    jobdir.sweep_runtimes(root / "mine")
    assert sorted(path.name for path in root.iterdir()) == ["mine", "not empty", "not ours", "there"]


@pytest.mark.parametrize(
    ("host", "epoch", "kept"),
    [
        ("elsewhere", 2, False),  # a later supervisor has gone on without it
        ("elsewhere", 1, True),  # its own epoch: another node of the same run wrote the job file
        (socket.gethostname(), 2, True),  # about to be used here
        ("", 2, True),  # nobody says where
    ],
)
def test_what_a_job_left_on_a_host_before_it_went_to_another_is_swept(
    tmp_path: Path, host: str, epoch: int, kept: bool
) -> None:
    job = JobDirectory(tmp_path / "job")
    job.path.mkdir()
    runtime = tmp_path / "everstep" / "left"
    jobdir.lay_out_runtime(runtime, job.path, epoch=1, engine="slurm 4711")
    assert (runtime / "engine").read_text() == "slurm 4711"
    job.file.write_text(json.dumps(dict(
        run_id="a", runtime=str(runtime), epoch=epoch, identity="x", command=[], created=0.0, format=1, host=host
    )))  # fmt: skip
    jobdir.sweep_runtimes(tmp_path / "everstep" / "mine")
    assert runtime.exists() is kept


def test_a_slot_on_disk_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    jobdir.lay_out_runtime(runtime, tmp_path)
    (runtime / "slots" / "1").rmdir()
    (runtime / "slots" / "1").symlink_to(tmp_path / "swept")
    jobdir.lay_out_runtime(runtime, tmp_path)
    assert (runtime / "slots" / "1").is_dir()
    assert not (runtime / "slots" / "1").is_symlink()
