"""Hangs of each kind are found within their limit and named; what only looks like one is left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor.model import AttemptEnded, Failure, FailureKind, FirstStep, State
from tests.e2e.harness import PROGRAMS, Job, torchrun

STUCK = str(PROGRAMS / "stuck.py")
LIMIT = 2.0
QUICK = (
    "--hang-floor",
    f"{LIMIT:g}s",
    "--hang-startup",
    "60s",
    "--snapshot-every",
    "5steps",
)

#: what strikes, one in each attempt: rank, step, kind → kind of hang, rank named, words of the reason
HANGS = {
    "0/1:12:sleep": ("main_thread", 1, "rank 1 hangs at programs/stuck.py"),
    "1/0:22:gil": ("gil", 0, "its lock (GIL)"),
    "2/1:32:stop": ("stopped", 1, "SIGSTOP"),
    "3/0:42:barrier": ("main_thread", None, "collectives that do not match"),
}


def failure_of(job: Job, attempt: int = 0) -> tuple[Failure, dict[str, Any]]:
    """The failure of an attempt, and its evidence."""
    ended = job.facts(AttemptEnded)[attempt]
    assert ended.failure is not None, job.output
    document = json.loads((job.folder / "attempts" / f"{attempt:06d}" / "failure.json").read_text())
    return ended.failure, document["evidence"]


def struck(*strikes: str) -> list[str]:
    return [word for strike in strikes for word in ("--strike", strike)]


def test_hangs_are_found_named_and_answered(job: Job) -> None:
    """And a crash leaves the stacks of the rank."""
    command = torchrun("--steps", 60, *struck(*HANGS, "4/1:52:crash"), script=STUCK)
    assert job.run(command, *QUICK) == 0, job.output
    for attempt, (strike, (kind, rank, words)) in enumerate(HANGS.items()):
        failure, evidence = failure_of(job, attempt)
        assert (failure.kind, failure.rank) == (FailureKind.HANG, rank), failure
        assert failure.step == 12 + 10 * attempt
        assert words in failure.reason
        hang = evidence["hang"]
        assert hang["kind"] == kind
        assert min(each["quiet"] for each in hang["ranks"]) > hang["limit"] >= LIMIT
        stuck = strike[2]
        if rank is not None:
            assert any("_engine_run_backward" in line for line in evidence["stacks"][str(1 - rank)])
        if kind != "stopped":
            assert any("(strike)" in line for line in evidence["stacks"][stuck])
            whole = job.folder / "attempts" / f"{attempt:06d}" / "stacks" / f"rank-{stuck}.txt"
            assert "strike" in whole.read_text()
    failure, evidence = failure_of(job, 4)
    assert (failure.kind, failure.signal) == (FailureKind.CRASH, signal.SIGSEGV)
    assert any("(strike)" in line for line in evidence["stacks"]["1"])
    assert job.record.restarts == 5
    assert job.record.state is State.COMPLETED
    job.until_no_processes()


def test_without_a_session(job: Job) -> None:
    command = torchrun("--strike", "1:12:sleep", "--no-session", script=STUCK)
    assert job.run(command, *QUICK) == 0, job.output
    failure, _ = failure_of(job)
    assert (failure.kind, failure.rank, failure.step) == (FailureKind.HANG, 1, 12)


def test_a_limit_of_ones_own_is_for_a_step_whatever_goes_on_in_it(job: Job) -> None:
    command = torchrun("--strike", "0:12:busy:600", script=STUCK, ranks=1)
    assert job.run(command, *QUICK, "--hang", "3s") == 0, job.output
    failure, evidence = failure_of(job)
    assert failure.kind is FailureKind.HANG
    assert evidence["hang"]["limit"] == 3.0


def test_slow_but_alive(job: Job) -> None:
    """A first step, an evaluation and Python code at work, each beyond the limit of a step; one rank, the other waits.

    And then all of it is stopped for longer than the limit, supervisor and all, and goes on.
    """
    slow = ("0:0:nap:4", "1:15:busy:6", "0:25:evaluate:5")
    process = job.start(torchrun("--steps", 200, *struck(*slow), script=STUCK), *QUICK)
    job.until(lambda: "strikes at step 25" in job.output or None)
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in tree:
        each.suspend()
    pass_by(3 * LIMIT)
    for each in reversed(tree):
        each.resume()
    assert job.wait() == 0, job.output
    assert "limits of hangs start again" in job.output
    assert [fact.failure for fact in job.facts(AttemptEnded)] == [None], job.output


TRACER = """
import ctypes, os, sys
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
if libc.ptrace(16, pid, None, None):  # PTRACE_ATTACH
    sys.exit(os.strerror(ctypes.get_errno()))
os.waitpid(pid, 0x40000000)  # __WALL
print("attached", flush=True)
sys.stdin.read()
libc.ptrace(17, pid, None, None)  # PTRACE_DETACH
"""


@pytest.mark.may_skip(reason="a sandbox may forbid ptrace")
def test_a_debugger_is_no_hang(job: Job) -> None:
    job.start(torchrun("--steps", 200, script=STUCK), *QUICK, "--snapshot-every", "never")
    job.until_fact(FirstStep)
    (rank,) = (each.pid for each in job.processes() if each.environ().get("RANK") == "1")
    with subprocess.Popen(
        [sys.executable, "-c", TRACER, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stdin is not None
        assert tracer.stdout is not None
        if tracer.stdout.readline() != "attached\n":
            pytest.skip("ptrace is not allowed here")
        job.until(lambda: "debugger is attached to rank 1" in job.output or None)
        pass_by(2 * LIMIT)
        tracer.stdin.close()
    assert job.wait() == 0, job.output
    assert [fact.failure for fact in job.facts(AttemptEnded)] == [None], job.output


def test_the_slow_rank_is_named(job: Job) -> None:
    job.start(torchrun("--steps", 100_000, "--own", "0.1", script=STUCK), *QUICK)
    job.until_fact(FirstStep)
    job.until(lambda: True if job.status()["slow_rank"] == 1 else None)
    rank_0, rank_1 = job.status()["own_shares"]  # type: ignore[misc]
    assert rank_0 < rank_1
    job.signal(signal.SIGINT)
    assert job.wait() == 130


def test_silence_is_a_hang_on_request(job: Job, tmp_path: Path) -> None:
    """For a program without torch, of which nothing else is known."""
    script = tmp_path / "silent.py"
    script.write_text(
        "import os, time\nprint('hello')\nif os.environ['EVERSTEP_ATTEMPT'] == '0': time.sleep(600)\n"
    )
    assert job.run([sys.executable, str(script)], "--hang-silence", "2s") == 0, job.output
    failure, evidence = failure_of(job)
    assert failure.kind is FailureKind.HANG
    assert "no rank has written any output for 2 s" in failure.reason
    assert any("silent.py:3" in line for line in evidence["stacks"]["0"])


def pass_by(seconds: float) -> None:
    """Let time pass: that is what is tested."""
    threading.Event().wait(seconds)
