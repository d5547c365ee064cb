"""``make demo``: train a GPT with two workers, kill one, watch the job come back, and check that nothing was lost.

The same script is then run by plain torchrun, undisturbed and without everstep, and the final weights are compared.
Every number printed is measured in this run; the exit code is not 0 unless all that is claimed was seen to be true.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SNAPSHOT_EVERY = 20
DEADLINE = 180.0  # seconds for any one thing that is waited for
FINAL = re.compile(r"final weights ([0-9a-f]{32}) after (\d+) steps")

Fact = dict[str, Any]
T = TypeVar("T")


class UntrueError(Exception):
    """Something that the demo claims did not come true."""


def fail(what: str) -> NoReturn:
    """Say what was not true."""
    raise UntrueError(what)


def tell(text: str = "") -> None:
    """One line of the story."""
    print(f"demo: {text}" if text else "", flush=True)


def facts(job: Path) -> Iterator[Fact]:
    """The job's journal so far, oldest first."""
    for path in sorted((job / "journal").glob("*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def the_fact(job: Path, name: str, condition: Callable[[Fact], bool] = lambda _: True) -> Fact | None:
    """The first fact of that name that meets the condition."""
    return next((fact for fact in facts(job) if fact["fact"] == name and condition(fact)), None)


def status(job: Path) -> Fact:
    """What ``everstep status --json`` says; empty while there is no job yet."""
    done = subprocess.run(
        [BIN / "everstep", "status", "--dir", job, "--json"], capture_output=True, text=True, check=False
    )
    answer: Fact = json.loads(done.stdout) if done.returncode == 0 else {}
    return answer


def wait_for(what: str, look: Callable[[], T | None], run: subprocess.Popen[bytes]) -> T:
    """Look until there is something to see; fails when the run ends first or the deadline passes."""
    deadline = time.monotonic() + DEADLINE
    while (seen := look()) is None:
        if run.poll() is not None:
            fail(f"the run ended with code {run.returncode} before {what}")
        if time.monotonic() > deadline:
            fail(f"waited {DEADLINE:g} s for {what}")
        time.sleep(0.05)
    return seen


def worker(run: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process of one rank of the attempt that trains: the next attempt waits beside it, with ranks of its own."""
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            environment = process.environ()
            if (environment.get("EVERSTEP_ATTEMPT"), environment.get("RANK")) == ("0", str(rank)):
                return process
        except psutil.Error:
            continue  # it ended while we looked
    fail(f"no process of rank {rank} was found")


def final_weights(text: str, steps: int) -> str:
    """The digest of the weights that the training printed at its end."""
    found = FINAL.findall(text)
    if [int(count) for _, count in found] != [steps]:
        fail(f"the training should have ended once, after {steps} steps; it said: {found}")
    digest: str = found[0][0]
    return digest


def kill_and_watch(job: Path, training: list[str], steps: int) -> tuple[str, list[str]]:
    """Run under everstep, kill rank 1 midway; returns the digest of the final weights and what happened."""
    command: list[str | Path] = [
        BIN / "everstep",
        "run",
        "--dir",
        job,
        "--snapshot-every",
        f"{SNAPSHOT_EVERY}steps",
        *training,
    ]
    tell("$ " + shown(command))
    output = job.with_name("output")
    with output.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as run:
        try:

            def past_a_snapshot() -> Fact | None:
                now = status(job)
                snapshot = now.get("snapshot")
                midway = snapshot and snapshot["step"] >= steps // 4 and now["step"] >= snapshot["step"] + 5
                prepared = the_fact(job, "StandbyReady") is not None or now.get("step", 0) >= steps * 2 // 3
                return now if midway and prepared else None

            before = wait_for("a snapshot that it is well past, and a standby", past_a_snapshot, run)
            victim = worker(run, rank=1)
            killed = time.time()
            victim.send_signal(signal.SIGKILL)
            tell(
                f"SIGKILL to rank 1 (pid {victim.pid}); the newest snapshot is of step {before['snapshot']['step']}"
            )
            run.wait(DEADLINE)
        finally:
            if run.poll() is None:
                run.kill()  # its workers die with it
            for line in output.read_text().splitlines():
                print(f"      | {line}", flush=True)
    if run.returncode != 0:
        fail(f"everstep run ended with code {run.returncode}")
    return final_weights(output.read_text(), steps), recovery(job, killed)


def recovery(job: Path, killed: float) -> list[str]:
    """What the journal says of the death and of what followed; fails when it is not what is claimed."""
    ended = the_fact(job, "AttemptEnded", lambda fact: fact["attempt"] == 0) or fail("no end of attempt 0")
    resumed = the_fact(job, "Resumed", lambda fact: fact["attempt"] == 1) or fail("attempt 1 did not resume")
    first = the_fact(job, "FirstStep", lambda fact: fact["attempt"] == 1) or fail("attempt 1 made no step")
    lost = ended["step"] - resumed["step"]
    if (ended["failure"]["kind"], ended["failure"]["rank"]) != ("crash", 1):
        fail(f"the failure was taken for another one: {ended['failure']}")
    if not 0 < resumed["step"] <= ended["step"] or not 0 <= lost <= 3 * SNAPSHOT_EVERY:
        fail(f"it stood at step {ended['step']} and resumed at step {resumed['step']}")
    if status(job).get("state") != "completed" or the_fact(
        job, "AttemptStarted", lambda fact: fact["attempt"] > 1
    ):
        fail("the job should have completed with its second attempt")
    return [
        f"rank 1 died          at {clock(killed)}, after step {ended['step']} of the furthest rank",
        f"cause                {ended['failure']['reason']}",
        f"resumed              from step {resumed['step']} ({resumed['tier']}): {lost} steps were done again",
        f"first step after it  at {clock(first['time'])}, {(first['time'] - killed) * 1000:.0f} ms after the kill",
    ]


def undisturbed(training: list[str], steps: int) -> str:
    """The digest that plain torchrun ends with, when nothing happens and nothing of everstep is in the script."""
    command: list[str | Path] = [BIN / training[0], *training[1:], "--no-session"]
    tell("$ " + shown(command))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE, check=False
    )
    if not FINAL.search(
        done.stdout
    ):  # its exit code is no measure: gloo aborts now and then after the last line
        fail(f"plain torchrun ended with code {done.returncode}:\n{done.stdout}")
    return final_weights(done.stdout, steps)


def shown(command: list[str | Path]) -> str:
    """A command as one would type it."""
    return " ".join(str(word).removeprefix(f"{BIN}/") for word in command)


def clock(moment: float) -> str:
    """Time of day, with milliseconds."""
    return time.strftime("%H:%M:%S", time.localtime(moment)) + f".{moment % 1 * 1000:03.0f}"


def main() -> int:
    """Tell the story; 0 when all of it was true."""
    # as in an activated environment, and without torchrun's warning about it
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--script", type=Path, default=Path(os.path.relpath(HERE / "gpt_ddp.py")))
    arguments = parser.parse_args()
    training = ["torchrun", "--nproc-per-node=2", str(arguments.script), "--steps", str(arguments.steps)]
    folder = Path(tempfile.mkdtemp(prefix="everstep-demo-"))
    try:
        killed, story = kill_and_watch(folder / "job", training, arguments.steps)
        reference = undisturbed(training, arguments.steps)
        tell()
        for line in story:
            tell(line)
        tell(f"final weights        {killed}  killed, under everstep")
        tell(f"                     {reference}  undisturbed, plain torchrun")
        if killed != reference:
            fail("the final weights differ")
        tell("every bit is the same")
    except (UntrueError, subprocess.TimeoutExpired) as error:
        tell(f"NOT TRUE: {error}")
        tell(f"the job directory is kept: {folder / 'job'}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
