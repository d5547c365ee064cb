"""The command line itself: every wrong word is one line and a code; checkpoints of a job on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from supervisor.checkpoint.catalog import step_directory
from supervisor.checkpoint.commit import drain
from supervisor.edge.jobdir import JobDirectory
from supervisor.edge.journal import Journal
from supervisor.model import (
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    Resumed,
    RunStarted,
    Tier,
)
from tests.checkpoint.tools import flip_bit, origin, write_source

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    slurm = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    for name in ("EVERSTEP_DEBUG", "EVERSTEP_KEY", *slurm):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def job(cwd: Path) -> Path:
    """A job with checkpoints of steps 100 to 600; the journal knows that 600 was damaged and that 500 was resumed from."""
    directory = JobDirectory(cwd / "everstep-runs" / "train")
    with directory.claim():
        directory.open_epoch("train.py", ["python", "train.py"])
    checkpoints = directory.path / "checkpoints"
    for step in range(100, 700, 100):
        source = write_source(cwd / "source", seed=step)
        drain(source, step_directory(checkpoints, step), origin(step, metrics={"loss": 1 / step}))
    flip_bit(step_directory(checkpoints, 600) / "__0_0.distcp", 50)
    journal = Journal(directory.journal / "here.jsonl", lambda problem: None)
    path = str(step_directory(checkpoints, 500))
    journal.append(CheckpointCommitted(time=1, attempt=0, step=500, path=path, seconds=1, bytes=1))
    journal.append(CheckpointRejected(time=2, path=str(step_directory(checkpoints, 600)), reason="damaged"))
    journal.append(Resumed(time=3, attempt=1, step=500, tier=Tier.CHECKPOINT, path=path))
    journal.close()
    return directory.path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.call(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    code, out, _ = call(capsys, "checkpoints", *words, "--json")
    assert code == 0
    found: list[dict[str, Any]] = json.loads(out)
    return found


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("", 64, "no command given: run, status, checkpoints, rehearse, submit, doctor or simulate"),
        ("stauts", 64, "invalid choice: 'stauts'"),
        ("--brief", 64, "unknown option --brief"),
        ("run", 64, "no program given"),
        ("run --", 64, "no program given"),
        (
            "run --snapshot-evry 5s python x.py",
            64,
            "unknown option --snapshot-evry (did you mean --snapshot-every?)",
        ),
        ("run --snap 5s python x.py", 64, "unknown option --snap"),
        ("run --dir", 64, "argument --dir: expected one argument"),
        ("run python none.py", 64, "script none.py does not exist"),
        ("run --grace 5 python none.py", 78, "--grace: '5' is no duration"),
        ("run --config none.yaml python none.py", 78, "none.yaml: No such file"),
        ("status", 64, "no job in "),
        ("status --dir nowhere", 78, "no job in "),
        ("status --jsn", 64, "unknown option --jsn (did you mean --json?)"),
        ("status nowhere", 64, "unknown option nowhere"),
        ("checkpoints", 64, "required: list | verify | inspect"),
        ("checkpoints lst", 64, "invalid choice: 'lst'"),
        ("checkpoints list --dir nowhere", 78, "no job in "),
        ("checkpoints verify x", 64, "'x' is no checkpoint"),
        ("checkpoints prune --dir nowhere", 78, "no job in "),
        ("checkpoints prune --keep-last x", 64, "no job in "),
    ],
)
def test_wrong_words(capsys: pytest.CaptureFixture[str], words: str, code: int, said: str) -> None:
    found, out, err = call(capsys, *words.split())
    assert (found, out) == (code, "")
    assert err.startswith("everstep: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    "words",
    ["--help", "run --help", "status -h", "checkpoints --help", "checkpoints prune --help", "--version"],
)
def test_help_and_version(capsys: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.call(words.split())
    assert caught.value.code == 0
    assert "everstep" in capsys.readouterr().out


def test_every_option_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    from supervisor.config import READERS

    with pytest.raises(SystemExit):
        cli.call(["run", "--help"])
    text = capsys.readouterr().out
    for name in (*READERS, "config"):
        assert f"--{name.strip('_').replace('_', '-')}" in text


def test_options_end_where_the_program_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "run_job", lambda options, program: seen.append((options, program)) or 0)
    Path("train.py").touch()
    Path("everstep.yaml").write_text("keep-last: 7\nquiet: true\n")
    assert (
        cli.call("run --keep-every 50 --no-quiet python train.py --quiet --dir x -- --continue".split()) == 0
    )
    assert cli.call("run --name mine --continue -- python train.py".split()) == 0
    assert cli.call("run --dir d --keep-best loss:max:2 python train.py".split()) == 0
    (first, program), (second, _), (third, _) = seen
    assert (first.keep_every, first.keep_last, first.quiet, first.continue_) == (50, 7, False, False)
    assert first.dir == Path("everstep-runs/train")
    assert program.arguments == ("--quiet", "--dir", "x", "--", "--continue")
    assert (second.dir, second.continue_, second.quiet) == (Path("everstep-runs/mine"), True, True)
    assert (third.dir, third.keep_best.count) == (Path("d"), 2)


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({"SLURM_JOB_ID": "4711"}, "train-4711"),
        ({"SLURM_JOB_ID": "4714", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"}, "train-4711_3"),
        ({"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "4"}, "train-4711_4"),
        ({"SLURM_JOBID": "4711"}, "train-4711"),
        ({"SLURM_JOB_ID": ""}, "train"),
    ],
)
def test_each_slurm_job_has_a_directory_of_its_own(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], directory: str
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "run_job", lambda options, program: seen.append(options.dir) or 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    Path("train.py").touch()
    assert cli.call("run python train.py".split()) == 0
    assert cli.call("run --dir d python train.py".split()) == 0
    assert seen == [Path("everstep-runs") / directory, Path("d")]


def test_watching_ends_with_a_supervisor_that_was_killed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cwd: Path
) -> None:
    directory = JobDirectory(cwd / "job")
    with directory.claim():
        directory.open_epoch("train.py", ["python", "train.py"])
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it goes on"))
    assert call(capsys, "status", "--watch", "--json", "--dir", "job")[0] == 0
    journal = Journal(directory.journal / "here.jsonl", lambda problem: None)
    journal.append(
        RunStarted(
            time=1, epoch=1, host="h", pid=1, command=(), version="0", max_failures=5, max_preemptions=5
        )
    )
    journal.append(AttemptStarted(time=2, attempt=0))
    journal.close()
    code, out, _ = call(capsys, "status", "--watch", "--json", "--dir", "job")
    assert (code, json.loads(out)["state"]) == (0, "preempted")


def test_list(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    records = listed(capsys, "list")
    assert [record["step"] for record in records] == [600, 500, 400, 300, 200, 100]
    assert [record["verified"] for record in records] == [False, True, None, None, None, None]
    assert records[1] == {
        "step": 500, "path": str(job / "checkpoints" / "step-000000500"), "bytes": 6101, "metrics": {"loss": 1 / 500},
        "created": 1_700_000_000.25, "verified": True, "problem": None, "bytes_on_disk": 12288, "best": True,
    }  # fmt: skip
    (job / "checkpoints" / "step-000000300" / "__0_0.distcp").unlink()
    assert [record["verified"] for record in listed(capsys, "list", "--verify")] == [
        False, True, True, False, True, True,
    ]  # fmt: skip
    code, out, _ = call(capsys, "checkpoints", "list")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["step", "made", "size", "on", "disk", "state", "loss"]
    assert (lines[1].split()[0], lines[2].split()[:2]) == ("600", ["*", "500"])
    assert "verified" in lines[2]
    assert "damaged" in lines[4]
    assert "step-000000300: __0_0.distcp: missing" in out
    assert lines[-2].startswith("6 checkpoints in ")
    assert lines[-1] == "* the best: loss:min"


def test_verify(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    code, out, _ = call(capsys, "checkpoints", "verify", "--dir", str(job))
    assert code == 1
    assert out.split()[:2] == ["step", "600"]
    assert "__0_0.distcp" in out.splitlines()[0]
    assert call(capsys, "checkpoints", "verify", "500", "400")[0] == 0
    code, _, err = call(capsys, "checkpoints", "verify", "150")
    assert code == 64
    assert "no checkpoint of step 150" in err
    assert "there are: 600, 500" in err
    copy = shutil.copytree(job / "checkpoints" / "step-000000600", "kept")
    code, out, _ = call(
        capsys, "checkpoints", "verify", "latest", "best", "400", str(job / "checkpoints" / "step-000000300")
    )
    assert (code, [line.split()[1] for line in out.splitlines()]) == (1, ["400", "500", "600", "300"])
    code, out, _ = call(capsys, "checkpoints", "verify", "kept", "--json", "--dir", "nowhere")
    assert code == 1
    assert json.loads(out)[0]["problem"] == "__0_0.distcp: digest does not match"
    (Path(copy) / "everstep.json").unlink()
    assert "no everstep.json" in call(capsys, "checkpoints", "verify", "./kept")[1]
    assert call(capsys, "checkpoints", "verify", "./none")[0] == 64


def test_prune(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    would = listed(capsys, "prune", "--dry-run", "--keep-last", "1", "--keep-every", "200")
    assert [record["step"] for record in would] == [300, 100]
    assert len(listed(capsys, "list")) == 6
    assert listed(capsys, "prune", "--keep-last", "1", "--keep-every", "200") == would
    assert [record["step"] for record in listed(capsys, "list")] == [
        600,
        500,
        400,
        200,
    ]  # the damaged one is left alone
    code, out, _ = call(capsys, "checkpoints", "prune")
    assert (code, out.split()[:3]) == (0, ["nothing", "to", "remove"])


def test_prune_leaves_a_running_job_alone(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    with JobDirectory(job).claim():
        code, _, err = call(capsys, "checkpoints", "prune", "--keep-last", "1")
    assert code == 78
    assert "in use" in err
    assert len(listed(capsys, "list")) == 6


def test_the_newest_of_several_jobs_is_meant(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    other = JobDirectory(job.with_name("other"))
    with other.claim():
        other.open_epoch("other.py", ["python", "other.py"])
    for path in (job / "job.json", job / "journal" / "here.jsonl"):
        os.utime(path, (1, 1))
    code, out, err = call(capsys, "status", "--json")
    assert code == 0
    assert json.loads(out)["dir"] == str(other.path)
    assert "the newest of 2 jobs; --dir chooses" in err


def test_a_bug_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cli, "find_job", broken)
    assert call(capsys, "status") == (
        70,
        "",
        "everstep: unexpected RuntimeError: two lines (EVERSTEP_DEBUG=1 shows where)\n",
    )
    monkeypatch.setenv("EVERSTEP_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli.call(["status"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "find_job", interrupted)
    assert cli.call(["status"]) == 130


def everstep(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words], env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True, stderr=subprocess.PIPE, timeout=60, **settings,
    )  # fmt: skip


def test_a_reader_that_has_gone(job: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = everstep("checkpoints", "list", "--json", stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_help_imports_little(job: Path) -> None:
    program = (
        "import sys; from launch import cli\n"
        "code = cli.call(['status', '--json'])\n"
        "heavy = {'torch', 'numpy', 'yaml', 'asyncio', 'multiprocessing'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
