"""Bad input: each gets its one line and its exit code, or a safe fallback, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor.checkpoint.storage import LocalStorage
from supervisor.edge import claiming
from supervisor.model import CheckpointFailed, CheckpointRejected, FailureKind, Resumed, State, Tier
from supervisor.resume import Sources, choose
from supervisor.staging import Staging
from tests.e2e import harness
from tests.e2e.harness import Job, digests, python, torchrun

STEPS = 30


def refused(job: Job, code: int, *said: str) -> None:
    """It ended with ``code`` and one line that says it all."""
    assert job.wait() == code, job.output
    assert "Traceback" not in job.output
    last = job.output.strip().splitlines()[-1]
    assert last.startswith("everstep: "), job.output
    for text in said:
        assert text in last, last


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--no-such-option"], 64, ["--no-such-option"]),
        ([], 64, ["no program", "torchrun"]),
        (["bash", "x.sh"], 64, ["bash", "torchrun"]),
        (["torchrun", "--nproc-per-node=2", "no_such_script.py"], 64, ["no_such_script.py"]),
        (["torchrun", "--nnodes=2", harness.TRAIN], 64, ["--nnodes"]),
        (["--snapshot-every", "5", "torchrun", harness.TRAIN], 78, ["5", "50steps"]),
        (["--keep-last", "0", "torchrun", harness.TRAIN], 78, ["keep_last"]),
        (["--keep-best", "loss", "torchrun", harness.TRAIN], 78, ["METRIC:min|max:M"]),
        (["--checkpoints", "ftp://host/x", "torchrun", harness.TRAIN], 78, ["ftp://", "s3://bucket/prefix"]),
        (
            ["--snapshot-every", "50steps", "--checkpoint-every", "10steps", "torchrun", harness.TRAIN],
            78,
            ["contradicts"],
        ),
    ],
)
def test_a_wrong_command_line(job: Job, arguments: list[str], code: int, said: list[str]) -> None:
    job.start([], *arguments)
    refused(job, code, *said)
    assert not (job.folder / "job.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snapshot_evry: 5s\n", ["snapshot_evry", "snapshot"]),
        ("keep_last: many\n", ["keep_last", "many"]),
        ("snapshot_every: [1\n", ["line"]),
        ("snapshot_every: 50steps\ncheckpoint_every: 10steps\n", ["contradicts"]),
    ],
)
def test_a_wrong_configuration_file(job: Job, tmp_path: Path, text: str, said: list[str]) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    job.start(torchrun("--out", tmp_path / "out"), "--config", path)
    refused(job, 78, *said)


def test_a_job_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with harness.job(tmp_path / "file" / "job") as job:
        job.folder = tmp_path / "file" / "job"
        argv = [*harness.RUN, "--dir", str(job.folder), *torchrun("--out", "x")]
        result = subprocess.run(
            argv, cwd=harness.ROOT, env=harness.environment(), capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 78
        assert result.stderr.startswith("everstep: ")
        assert "Not a directory" in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system that refuses every write, root's too."""
    place = tmp_path / "read-only"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_job_directory_on_read_only_storage(read_only: Path, tmp_path: Path) -> None:
    with harness.job(tmp_path / "job") as job:
        job.start(torchrun("--out", tmp_path / "out"), "--dir", read_only / "job")
        refused(job, 78, "Read-only file system")


def test_checkpoints_that_another_job_uses(job: Job, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    lock = claiming.claim(place, "another", Path("/jobs/another"))
    assert lock is not None
    with lock:
        job.start(torchrun("--out", tmp_path / "out"), "--checkpoints", place)
        refused(job, 78, str(place), "/jobs/another")
    assert [path.name for path in place.iterdir()] == [claiming.NAME]


def test_the_directory_of_another_job(job: Job, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text("print('other')\n")
    assert job.run(torchrun(script=str(other))) == 0, job.output
    job.start(torchrun("--out", tmp_path / "out"))
    refused(job, 78, "other.py", "train.py", "--dir")


# --------------------------------------------------------------------------- damaged checkpoints

#: the finished job is made once
FINISHED = pytest.mark.xdist_group("finished")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished job with checkpoints at 10, 20 and 30 steps."""
    folder = tmp_path_factory.mktemp("finished")
    with harness.job(folder / "job") as job:
        code = job.run(torchrun("--out", folder / "out", "--steps", STEPS), "--checkpoint-every", "10steps")
        assert code == 0, job.output
        assert [path.name for path in sorted((job.folder / "checkpoints").iterdir())] == [
            f"step-{step:09d}" for step in (10, 20, 30)
        ]
        yield job.folder


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of an undisturbed run of forty steps, without a Session."""
    return harness.plain_digests(tmp_path_factory.mktemp("forty"), 40)


def flip(name: str, at: float) -> Callable[[Path], None]:
    """Flip one bit of the file, ``at`` of the way through it."""

    def damage(checkpoint: Path) -> None:
        path = next(checkpoint.glob(name))
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "__1_0.distcp", 100)


def swap(checkpoint: Path) -> None:
    one, two, spare = checkpoint / "__0_0.distcp", checkpoint / "__1_0.distcp", checkpoint / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)


def newer(checkpoint: Path) -> None:
    path = checkpoint / "everstep.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"version": 99}))


DAMAGES = {
    "a bit of the payload": flip("__0_0.distcp", 0.5),
    "a bit of a header": flip("__1_0.distcp", 0.0),
    "a bit of the index": flip(".metadata", 0.5),
    "a bit of the manifest": flip("everstep.json", 0.5),
    "a truncated file": truncate,
    "a missing file": lambda checkpoint: (checkpoint / "__0_0.distcp").unlink(),
    "a missing manifest": lambda checkpoint: (checkpoint / "everstep.json").unlink(),
    "two files swapped": swap,
    "a newer version's manifest": newer,
}


@FINISHED
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(finished: Path, tmp_path: Path, damage: str) -> None:
    """What the ranks are told to resume from, of checkpoints of a real training."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", checkpoints)
    DAMAGES[damage](checkpoints / "step-000000030")
    resume = choose(Sources(None, [LocalStorage(checkpoints)], None, Staging(tmp_path / "run", tmp_path)))
    assert (resume.step, resume.tier) == (20, Tier.CHECKPOINT)
    ((path, reason),) = resume.rejected
    assert path == checkpoints / "step-000000030"
    assert reason


@FINISHED
def test_damaged_checkpoints_are_skipped_for_the_newest_good_one(
    finished: Path, tmp_path: Path, forty: dict[str, str]
) -> None:
    shutil.copytree(finished, tmp_path / "job")
    DAMAGES["a bit of the payload"](tmp_path / "job" / "checkpoints" / "step-000000030")
    DAMAGES["a newer version's manifest"](tmp_path / "job" / "checkpoints" / "step-000000020")
    with harness.job(tmp_path / "job") as job:
        out = tmp_path / "out"
        assert job.run(torchrun("--out", out, "--steps", 40), "--continue") == 0, job.output
        assert job.facts(Resumed)[-1].step == 10
        rejected = job.facts(CheckpointRejected)
        assert [Path(fact.path).name for fact in rejected] == ["step-000000030", "step-000000020"]
        assert all(fact.reason in job.output for fact in rejected)
        assert "99" in rejected[1].reason
        assert digests(out) == forty


@FINISHED
def test_without_any_good_checkpoint_the_job_is_not_begun_anew(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "job")
    for checkpoint in (tmp_path / "job" / "checkpoints").iterdir():
        truncate(checkpoint)
    with harness.job(tmp_path / "job") as job:
        job.start(torchrun("--out", tmp_path / "out", "--steps", 40), "--continue")
        refused(job, 1, "none that is whole", "__1_0.distcp")
        status = job.status()
        assert (status["state"], status["exit_code"]) == ("failed", 1)
        assert not (tmp_path / "out").exists()


@FINISHED
def test_with_a_key_what_was_made_without_it_is_not_resumed_from(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "job")
    argv = [*harness.RUN, "--dir", str(tmp_path / "job"), "--continue",
            *torchrun("--out", tmp_path / "out", "--steps", 40)]  # fmt: skip
    result = subprocess.run(
        argv, cwd=harness.ROOT, env={**harness.environment(), "EVERSTEP_KEY": "0123456789abcdef" * 4},
        capture_output=True, text=True, timeout=harness.DEADLINE,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    assert "none that is whole" in result.stderr
    assert "made without a key" in result.stderr
    assert not (tmp_path / "out").exists()


@FINISHED
def test_a_state_that_no_longer_fits_is_named(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "job")
    with harness.job(tmp_path / "job") as job:
        job.start(torchrun("--out", tmp_path / "out", "--steps", 40, "--hidden", 32), "--continue")
        assert job.wait() == 1, job.output
        record = job.record
        assert record.state is State.FAILED
        assert record.last_failure is not None
        assert record.last_failure.kind is FailureKind.STATE_MISMATCH
        assert "0.weight" in record.last_failure.reason
        assert record.restarts == 0


# --------------------------------------------------------------------------- a full disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_costs_no_step(small: Path, tmp_path: Path, alone: dict[str, str]) -> None:
    """Checkpoints fail and are reported, training goes on; with room again the same command makes the state durable."""
    with harness.job(tmp_path / "small" / "job") as job:
        (small / "ballast").write_bytes(
            b"x" * ((64 << 20) - (300 << 10))
        )  # room for the journal and the logs only
        out = tmp_path / "out"
        every = ("--checkpoint-every", "10steps")
        command = python("--out", out, "--ballast", 1 << 20)
        assert job.run(command, *every) == 1, job.output
        assert "Traceback" not in job.output
        failed = job.facts(CheckpointFailed)
        assert [fact.step for fact in failed][-1] == STEPS
        assert "memory only" in job.output
        assert job.runtime.exists()
        assert digests(out) == alone
        (small / "ballast").unlink()
        assert job.run(command, *every) == 0, job.output
        assert job.facts(Resumed)[-1].step == STEPS
        assert job.status()["checkpoint"]["step"] == STEPS  # type: ignore[index]
        assert not job.runtime.exists()


def test_a_small_dev_shm_is_not_used(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """As in a default container: snapshots go to the temporary directory, and that is said once."""
    out = tmp_path / "out"
    argv = [*harness.RUN, "--dir", str(tmp_path / "job"), "--snapshot-every", "5steps",
            *torchrun("--out", out)]  # fmt: skip
    faults = [{"attempt": 0, "rank": 1, "step": 17, "kind": "SIGKILL"}]
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh", *argv],
        cwd=harness.ROOT, env={**harness.environment(faults), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=harness.DEADLINE,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.count("/dev/shm is too small") == 1
    assert digests(out) == undisturbed
    assert not list(tmp_path.glob("everstep-*/*"))
