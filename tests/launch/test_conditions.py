"""Each command that looks at a job, whatever state the job's directory is in: an answer or one line, and nothing is changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from launch import cli
from supervisor.checkpoint.catalog import step_directory
from supervisor.checkpoint.commit import drain
from supervisor.edge.jobdir import JobDirectory
from supervisor.edge.journal import Journal
from supervisor.model import (
    AttemptStarted,
    CheckpointCommitted,
    FirstStep,
    Progress,
    Resumed,
    RunStarted,
    WorkersReady,
)
from tests.checkpoint.tools import origin

ROOT = Path(__file__).parents[2]
FILE = "journal/here.jsonl"
FOLDING = ("status", "status --json", "status --watch", "report --json", "report -o r.html")
COMMANDS = (
    *FOLDING,
    "checkpoints list",
    "checkpoints list --json",
    "checkpoints verify",
    "checkpoints inspect latest",
    "checkpoints compare 20 40",
    "checkpoints export best -o out.safetensors",
    "checkpoints prune --dry-run",
    "simulate --time 1h --runs 1",
)
OTHERS = ("rehearse kill-rank", "serve --port 0")  # which need a job that runs, or go on


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that has made 40 steps, and been cut off with its supervisor."""
    directory = JobDirectory(tmp_path_factory.mktemp("made") / "job")
    with directory.claim():
        directory.open_epoch("train.py", ["python", "train.py"])
    journal = Journal(directory.path / FILE, pytest.fail)
    journal.append(
        RunStarted(
            time=1, epoch=1, host="h", pid=1, command=(), version="0", max_failures=5, max_preemptions=5
        )
    )
    journal.append(AttemptStarted(time=2, attempt=0))
    journal.append(WorkersReady(time=3, attempt=0, world_size=1))
    journal.append(Resumed(time=3, attempt=0, step=0, tier=None))
    journal.append(FirstStep(time=4, attempt=0, step=1))
    for step in (20, 40):
        source = directory.path / f"source-{step}"
        dcp.save({"model": {"w": torch.full((4,), float(step))}}, checkpoint_id=source, no_dist=True)
        place = step_directory(directory.path / "checkpoints", step)
        manifest = drain(source, place, origin(step, metrics={"loss": 1 / step}))
        shutil.rmtree(source)
        journal.append(Progress(time=4.0 + step, attempt=0, step=step, metrics={"loss": 1 / step}))
        journal.append(
            CheckpointCommitted(
                time=4.5 + step, attempt=0, step=step, path=str(place), seconds=1, bytes=manifest.bytes
            )
        )
    journal.close()
    return directory.path


@pytest.fixture
def job(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVERSTEP_KEY", raising=False)
    return Path(shutil.copytree(made, tmp_path / "job"))


Call = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(command: str, directory: str = "job") -> tuple[int, str, str]:
        code = cli.call([*command.split(), "--dir", directory])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def is_one_line(text: str) -> bool:
    return text.startswith("everstep: ") and text.count("\n") == 1


@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS])
def test_no_job(command: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(command)
    assert (code, out) == (78, "")
    assert is_one_line(err)
    assert f"no job in {tmp_path}/job" in err
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_job_that_runs_and_one_that_does_not(command: str, call: Call, job: Path) -> None:
    before = contents(job)
    assert call(command)[0] == 0
    if "--watch" not in command:  # which goes on for as long as the job does
        with JobDirectory(job).claim():
            code, out, err = call(command)
        assert (code, err) == (0, "")
        assert out
    assert contents(job) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_torn_last_line_was_not_written(command: str, call: Call, job: Path) -> None:
    with open(job / FILE, "ab") as file:
        file.write(b'{"v": 1, "kind": "Progre')
    code, out, err = call(command)
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_line_that_is_garbage_is_passed_over(command: str, call: Call, job: Path) -> None:
    lines = (job / FILE).read_bytes().splitlines(keepends=True)
    (job / FILE).write_bytes(b"".join([*lines[:6], b"\0\xff{\n", *lines[6:]]))
    code, out, err = call(command)
    assert code == 0
    if command in FOLDING:
        page = Path("r.html").read_text() if command == "report -o r.html" else ""
        assert "line 7" in out + err + page
    if command == "status --json":
        assert json.loads(out)["step"] == 40, "what comes after it counts"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_journal_of_a_newer_version(command: str, call: Call, job: Path) -> None:
    lines = [json.loads(line) for line in (job / FILE).read_text().splitlines()]
    (job / FILE).write_text("".join(json.dumps(line | {"v": 99}) + "\n" for line in lines))
    code, out, err = call(command)
    if command.startswith("report"):  # there is nothing to be told
        assert (code, out, is_one_line(err)) == (78, "", True)
        assert "newer everstep" in err
        return
    if command.startswith("simulate"):  # nothing to learn from
        assert (code, out, is_one_line(err)) == (64, "", True)
        return
    assert code == 0
    if command in FOLDING:
        assert "newer everstep" in out + err
    if command == "status":
        assert out.count("newer everstep") == 3
        assert "more, which --json lists" in out


@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS])
@pytest.mark.parametrize("text", ['{"format": 99}', "{no", "[]", '{"format": 1}'])
def test_a_job_file_that_cannot_be_used(command: str, text: str, call: Call, job: Path) -> None:
    (job / "job.json").write_text(text)
    code, out, err = call(command)
    if command.startswith("simulate"):  # the journal is all that it needs
        assert code == 0
        return
    assert (code, out) == (78, ""), err
    assert is_one_line(err)
    assert str(job / "job.json") in err


def test_what_a_newer_minor_version_adds_to_a_job_file_is_ignored(call: Call, job: Path) -> None:
    known = json.loads((job / "job.json").read_text())
    (job / "job.json").write_text(json.dumps(known | {"colour": "blue"}))
    assert call("status")[0] == 0


@pytest.fixture
def nobody() -> Iterator[None]:
    """This process without root's rights."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS])
def test_no_permission(command: str, call: Call, job: Path, request: pytest.FixtureRequest) -> None:
    call(command, "nowhere" if command in OTHERS else "job")  # what it imports may be readable by root alone
    job.chmod(0)
    for folder in job.parents:  # all but the job itself
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o011)
    request.getfixturevalue("nobody")
    code, out, err = call(command)
    assert (code, out) == (78, "")
    assert is_one_line(err)
    assert "Permission denied" in err
    assert "not a job file" not in err


def test_a_folder_that_may_not_be_looked_into_is_one_line(
    call: Call, job: Path, request: pytest.FixtureRequest
) -> None:
    call("checkpoints prune --dry-run")
    job.parent.chmod(0)
    request.getfixturevalue("nobody")
    code, _, err = call("checkpoints prune --dry-run")
    assert (code, is_one_line(err)) == (78, True)
    assert "everstep.yaml: Permission denied" in err


@pytest.mark.parametrize("command", ["status --json", "report -o -", "checkpoints inspect 40"])
def test_a_reader_that_has_gone(command: str, job: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", *command.split(), "--dir", job], stdout=writer, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_the_checkpoints_of_a_job_directory_are_those_in_it(
    how: str, call: Call, job: Path, made: Path, tmp_path: Path
) -> None:
    where = job
    if how == "moved":
        where = tmp_path / "elsewhere"
        (Path(shutil.copytree(made, tmp_path / "first"))).rename(where)
    code, out, _ = call("checkpoints list --json", str(where))
    assert code == 0
    assert {Path(one["path"]).parent for one in json.loads(out)} == {where / "checkpoints"}
    assert call("checkpoints prune --keep-last 1", str(where))[0] == 0
    assert sorted(path.name for path in (made / "checkpoints").iterdir()) == [
        "step-000000020",
        "step-000000040",
    ]


def contents(folder: Path) -> dict[str, int]:
    """Every file but the lock, and when it was changed."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): path.stat().st_mtime_ns for path in files}
