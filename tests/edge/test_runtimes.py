"""Runtime directories: where they lie, who uses them, and which of them are swept."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.edge import mounts, runtimes, sweeping
from supervisor.edge.jobdir import JobDirectory

ROOT = Path(__file__).parent.parent.parent


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
    sweeping.sweep(root / "mine")
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
    runtimes.lay_out(runtime, job.path, epoch=1, engine="slurm 4711")
    assert (runtime / "engine").read_text() == "slurm 4711"
    job.file.write_text(json.dumps(dict(
        run_id="a", runtime=str(runtime), epoch=epoch, identity="x", command=[], created=0.0, format=1, host=host
    )))  # fmt: skip
    sweeping.sweep(tmp_path / "everstep" / "mine")
    assert runtime.exists() is kept


def test_a_slot_on_disk_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtimes.lay_out(runtime, tmp_path)
    (runtime / "slots" / "1").rmdir()
    (runtime / "slots" / "1").symlink_to(tmp_path / "swept")
    runtimes.lay_out(runtime, tmp_path)
    assert (runtime / "slots" / "1").is_dir()
    assert not (runtime / "slots" / "1").is_symlink()


def left(tmp_path: Path, **changes: object) -> tuple[JobDirectory, Path]:
    """A job, and a runtime directory that it has laid out and does not use any more."""
    job = JobDirectory(tmp_path / "job")
    job.path.mkdir()
    runtime = tmp_path / "everstep" / "left"
    runtimes.lay_out(runtime, job.path).close()
    said = dict(run_id="a", runtime="elsewhere", epoch=1, identity="x", command=[], created=0.0, format=1)
    job.file.write_text(json.dumps(said | changes))
    return job, runtime


def test_what_is_in_use_is_not_swept_whatever_its_job_says(tmp_path: Path) -> None:
    """Containers that share memory may each have a job of that name."""
    job, runtime = left(tmp_path)
    code = (
        "import sys; from pathlib import Path; from supervisor.edge import runtimes\n"
        "lock = runtimes.lay_out(Path(sys.argv[1]), Path(sys.argv[2])); print('held', flush=True); sys.stdin.read()"
    )
    user = subprocess.Popen(
        [sys.executable, "-c", code, runtime, job.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert user.stdout is not None
    assert user.stdout.readline() == b"held\n"
    with runtimes.lay_out(runtime, job.path):  # nor by one who has used it since and has ended
        pass
    sweeping.sweep(tmp_path / "everstep" / "mine")
    assert runtime.exists()
    user.kill()  # however it ends
    user.wait()
    sweeping.sweep(tmp_path / "everstep" / "mine")
    assert not runtime.exists()


@pytest.mark.parametrize("deleted", [False, True], ids=["another job there", "no job there"])
def test_what_was_laid_out_where_other_files_are_seen_is_not_swept(tmp_path: Path, deleted: bool) -> None:
    job, runtime = left(tmp_path)
    if deleted:
        shutil.rmtree(job.path)
    sight = (runtime / runtimes.SIGHT).read_text()
    (runtime / runtimes.SIGHT).write_text("mnt:[1]\n1:1")
    sweeping.sweep(tmp_path / "everstep" / "mine")
    assert runtime.exists()
    (runtime / runtimes.SIGHT).write_text(
        "mnt:[1]\n" + sight.splitlines()[1]
    )  # a container that was made anew
    sweeping.sweep(tmp_path / "everstep" / "mine")
    assert not runtime.exists()


def test_the_same_job_by_another_path_is_no_copy(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path / "job")
    with job.claim():
        first = job.open_epoch("train.py", [])
        runtime = Path(first.runtime)
        with runtimes.lay_out(runtime, job.path):
            pass
    try:
        (tmp_path / "link").symlink_to(tmp_path / "job")
        shutil.copytree(tmp_path / "job", tmp_path / "copy")
        again = JobDirectory(tmp_path / "link").open_epoch("train.py", [])
        assert (again.run_id, again.runtime) == (first.run_id, first.runtime)
        copied = JobDirectory(tmp_path / "copy").open_epoch("train.py", [])
        assert copied.run_id != first.run_id
        runtimes.remove(Path(copied.runtime))
    finally:
        runtimes.remove(runtime)


# --------------------------------------------------------------------------- memory and disk


@pytest.fixture
def slot() -> Iterator[Path]:
    """One in memory, with a file in it."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    (folder / "0").mkdir()
    (folder / "0" / "__0_0.distcp").write_bytes(b"a snapshot")
    yield folder / "0"
    if (folder / "0").is_symlink():
        shutil.rmtree((folder / "0").resolve())
    shutil.rmtree(folder)


def test_memory_is_told_by_what_is_mounted(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from supervisor.edge import mounts; print(mounts.is_in_memory(Path(sys.argv[1])))"
    mounted = 'mount -t tmpfs tmpfs $2 && exec $0 -c "$1" $2'
    for script, said in (('exec $0 -c "$1" $2', "False"), (mounted, "True")):
        told = subprocess.run(
            ["unshare", "--mount", "bash", "-c", script, sys.executable, code, tmp_path],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert told.stdout.strip() == said


def test_a_slot_is_not_moved_from_memory_to_memory(
    slot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = slot.parent / "tmp"
    memory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(memory))
    if mounts.is_in_memory(Path("/var/tmp")):
        assert runtimes.move_slot_to_disk(slot) is None
        assert (slot / "__0_0.distcp").exists()
        return
    place = runtimes.move_slot_to_disk(slot)
    assert place is not None
    assert place.parent == Path("/var/tmp")
    assert slot.resolve() == place
    assert list(memory.iterdir()) == []


def test_slots_on_disk_from_before_a_reboot_are_swept(
    slot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = runtimes.move_slot_to_disk(slot)
    assert place is not None
    left = tmp_path / place.name.replace(runtimes.boot().partition("-")[0], "0badb007")
    left.mkdir(mode=0o700)
    (tmp_path / f"everstep-{os.getuid()}-slot@another_host@0badb007-x").mkdir(mode=0o700)
    (tmp_path / "everstep").mkdir()
    sweeping.sweep(tmp_path / "everstep" / "mine")
    assert place.exists()
    assert not left.exists()
    assert len(list(tmp_path.glob("*another_host*"))) == 1
