"""Each fault, on a job of two real ranks: found, named, recovered from, measured; and undone where it was not found."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from supervisor.checkpoint.catalog import list_checkpoints, verify
from supervisor.model import AttemptEnded, CheckpointCommitted, FirstStep, SnapshotCompleted
from tests.e2e.harness import ROOT, Job, environment, torchrun

LIMIT = 3.0  # seconds for a hang
OPTIONS = (
    *("--hang-floor", f"{LIMIT:g}s"),
    *("--snapshot-every", "10steps", "--checkpoint-every", "50steps"),
)
ENDLESS = ("--steps", 1_000_000, "--pause", "0.01")

#: kind, what it must be taken for
FAULTS = (
    ("kill-rank", "crash"),
    ("kill-torchrun", "launcher"),
    ("exception", "exception"),
    ("oom", "cuda_oom"),
    ("stop-rank", "hang"),
    ("stick-gil", "hang"),
    ("corrupt-checkpoint", "crash"),
)


def rehearse(job: Job, *words: object, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launch.cli", "rehearse", "--dir", job.folder, *words]
    return subprocess.run(
        [str(word) for word in argv],
        cwd=ROOT, env=environment(), stdin=stdin, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def reported(job: Job, *words: object) -> dict[str, Any]:
    done = rehearse(job, "--json", "--yes", *words)
    assert done.returncode in (0, 1), done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["recovered"] is (done.returncode == 0)
    return report


def until_it_can_fail_again(job: Job, attempt: int) -> None:
    """Something new is held since the last failure, and there are two checkpoints to go back to."""
    before = max((fact.step or 0 for fact in job.facts(AttemptEnded)), default=0)
    job.until_fact(FirstStep, lambda fact: fact.attempt == attempt)
    job.until_fact(SnapshotCompleted, lambda fact: fact.attempt == attempt and fact.step > before)
    job.until(lambda: True if len(job.facts(CheckpointCommitted)) > 1 else None)


def test_every_fault_one_after_the_other(job: Job, tmp_path: Path) -> None:
    job.start(torchrun("--out", tmp_path / "out", *ENDLESS), *OPTIONS)
    until_it_can_fail_again(job, 0)
    refused_or_undone(job)
    for attempt, (kind, taken_for) in enumerate(FAULTS):
        until_it_can_fail_again(job, attempt)
        report = reported(job, kind)
        assert report["recovered"], report
        assert (report["failure"], report["as_expected"]) == (taken_for, True), report
        assert (report["kind"], report["attempt"]) == (kind, attempt)
        assert report["rank"] == (None if kind == "kill-torchrun" else 1)
        assert report["detection"] >= (LIMIT if taken_for == "hang" else 0), report
        assert report["total"] > report["relaunch"] > report["restore"] > 0
        assert report["total"] == pytest.approx(
            report["detection"] + report["teardown"] + report["relaunch"] + report["pause"], abs=2.0
        )
        assert report["steps_lost"] >= 0
        (rejected,) = report["rejected"] if kind == "corrupt-checkpoint" else ("",)
        assert (rejected != "") is (report["resumed_from"] != "ram")
        assert not (job.folder / "rehearsal.json").exists()
        for record in list_checkpoints(
            job.folder / "checkpoints"
        ):  # one may go meanwhile: there are newer ones
            assert verify(record) == [] or not Path(record.path).exists()
    report = reported(job, "notice")
    assert (report["recovered"], report["exit_code"], report["steps_lost"]) == (True, 75, 0), report
    assert job.wait() == 75
    assert len(job.facts(AttemptEnded)) == len(FAULTS) + 1
    job.until_no_processes()


def refused_or_undone(job: Job) -> None:
    for words, said in (
        (("kill-rank",), "--yes does it"),
        (("--yes", "kill-rank", "--rank", 7), "ranks 0 to 1"),
        (("--yes", "kill-torchrun", "--rank", 1), "leave --rank out"),
        (("full-disk",), "shares its file system with"),
    ):
        done = rehearse(job, *words)
        assert (done.returncode, done.stdout) == (64, "")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    with (job.folder / "job.json").open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another rehearsal is under way" in rehearse(job, "--yes", "kill-rank").stderr
    ours, theirs = pty.openpty()
    os.write(ours, b"n\n")
    done = rehearse(job, "kill-rank", stdin=theirs)
    assert done.returncode == 130
    assert "SIGKILL to rank 1" in done.stderr
    for kind in ("stop-rank", "stick-gil"):  # well below the limit of a hang
        report = reported(job, "--timeout", "0.3s", kind)
        assert not report["recovered"]
        assert "the fault was not noticed" in report["result"]
        step = job.status()["step"]
        job.until(lambda seen=step: True if job.status()["step"] > seen else None)  # type: ignore[misc]
    broken_off(job)
    assert job.facts(AttemptEnded) == []


def broken_off(job: Job) -> None:
    """By SIGTERM; the rank goes on."""
    argv = [sys.executable, "-m", "launch.cli", "rehearse", "--dir", str(job.folder), "--yes", "stop-rank"]
    with subprocess.Popen(argv, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as one:
        assert one.stderr is not None
        assert "done: SIGSTOP to rank 1" in one.stderr.readline()
        one.terminate()
        assert "broken off" in one.stderr.read()
        assert one.wait() == 130
    step = job.status()["step"]
    job.until(lambda: True if job.status()["step"] > step else None)  # type: ignore[operator]


def test_a_program_without_torch_and_without_torchrun(job: Job, tmp_path: Path) -> None:
    """Nothing is known of its steps, so nothing could be told of its recovery."""
    script = tmp_path / "waits.py"
    script.write_text("import time\nprint('hello', flush=True)\ntime.sleep(600)\n")
    job.start([sys.executable, str(script)])
    job.until(lambda: True if "hello" in job.output else None)
    done = rehearse(job, "--yes", "kill-rank")
    assert done.returncode == 64
    assert "wait until it makes steps" in done.stderr


def test_a_full_disk(tmp_path: Path) -> None:
    """In a mount namespace of its own, whose disk is small and nobody else's."""
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    command = [*namespace, sys.executable, "-m", "tests.e2e.full_disk", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rehearse"], "rehearse what? one of kill-rank,"),
        (["rehearse", "fire"], "'fire' cannot be rehearsed; allowed: kill-rank,"),
        (["rehearse", "kill-rank", "--timeout", "soon"], "--timeout"),
        (["rehearse", "kill-rank", "--rnak", "1"], "did you mean --rank?"),
    ],
)
def test_wrong_words(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 64
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_list() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "rehearse", "--list", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert {kind for kind, _ in FAULTS} | {"notice", "full-disk"} == set(json.loads(done.stdout))
