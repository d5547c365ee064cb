"""From the kill of a rank to the first step of the next attempt: everstep with its standby and cold, and its peers.

The same tiny script (two ranks, gloo, DDP, a state file of its own so that every way of starting it resumes), the same
SIGKILL of rank 1, in one run on one machine. A kill comes when the attempt has made steps for ``--settle`` seconds, in
which the standby gets ready; a peer that has not made a step ``--limit`` seconds after the kill has not come back, and is
started anew. Exit code 1 when a goal is missed.

    python benchmarks/recovery.py [--kills 10] [--only NAME …]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from supervisor.edge import journal
from supervisor.model import AttemptEnded, AttemptStarted, Fact, FirstStep, Resumed, StandbyReady

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
START = 120.0  # seconds for a first step from nothing
GOAL = 0.15  # seconds, p95, with the standby
GOAL_RATIO = 12.0  # times faster than the best peer

SCRIPT = """
import os, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
folder, rank = os.environ["BENCH"], int(os.environ["RANK"])
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(32, 32))
optimizer = torch.optim.AdamW(model.parameters())
def saved():
    if os.path.exists(folder + "/state"):
        state = torch.load(folder + "/state")
        model.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"])
def step():
    model(torch.ones(4, 32)).sum().backward(); optimizer.step(); optimizer.zero_grad()
def note(first):
    if first:
        os.rename(written(), f"{folder}/first-{rank}-{os.getpid()}")
    time.sleep(0.01)
def written():
    name = f"{folder}/tmp-{rank}"
    with open(name, "w") as file:
        file.write(repr(time.time()))
    return name
first = True
if os.environ.get("EVERSTEP_RUNTIME"):
    from supervisor.training import Session
    with Session(model=model, optimizer=optimizer) as session:
        for _ in session.steps(10_000_000):
            step(); note(first); first = False
else:
    saved()
    count = 0
    while True:
        step(); note(first); first = False
        count += 1
        if rank == 0 and count % 50 == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder + "/state.tmp")
            os.rename(folder + "/state.tmp", folder + "/state")
"""

LOOP = 'while ! "$@"; do :; done'


@dataclass
class Result:
    """What one way of restarting has shown."""

    seconds: list[float] = field(default_factory=list)
    kills: int = 0
    phases: dict[str, list[float]] = field(default_factory=dict)


class Run:
    """One way of running the script, alive in a folder of its own."""

    def __init__(self, command: list[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="everstep-recovery-"))
        script = self.folder / "train.py"
        script.write_text(SCRIPT)
        self.job = self.folder / "job"
        words = [
            word.replace("SCRIPT", str(script)).replace("JOB", str(self.job)).replace("KILLS", "100000")
            for word in command
        ]
        environment = {
            **os.environ,
            "BENCH": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        with open(self.folder / "output", "wb") as sink:
            self.process = subprocess.Popen(
                words, env=environment, cwd=self.folder, stdout=sink, stderr=sink, start_new_session=True
            )

    def firsts(self) -> dict[int, tuple[int, float]]:
        """For each rank: the newest process that has made a step, and when it made its first."""
        found: dict[int, tuple[int, float]] = {}
        for path in self.folder.glob("first-*"):
            _, rank, pid = path.name.split("-")
            when = float(path.read_text())
            if when > found.get(int(rank), (0, 0.0))[1]:
                found[int(rank)] = (int(pid), when)
        return found

    def until_steps(self, after: float, limit: float) -> float | None:
        """When both ranks had made a first step later than ``after``; None if they do not within ``limit`` seconds."""
        deadline = time.time() + limit
        while time.time() < deadline:
            times = [when for _, when in self.firsts().values()]
            if len(times) == 2 and min(times) > after:
                return max(times)
            time.sleep(0.01)
        return None

    def facts(self) -> list[Fact]:
        """Everstep's journal so far, nothing for the others."""
        with contextlib.suppress(OSError):
            return journal.read(self.job / "journal", lambda _: None)
        return []

    def close(self) -> None:
        """End all of it, and only it."""
        tree = [psutil.Process(self.process.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += tree[0].children(recursive=True)
        for process in tree:  # the loop first, or it would start the next
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(tree[1:], timeout=20)
        with contextlib.suppress(OSError, ValueError, KeyError):
            shutil.rmtree(json.loads((self.job / "job.json").read_text())["runtime"], ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


TORCHRUN = ["torchrun", "--nproc-per-node=2"]
EVERSTEP = [
    sys.executable,
    "-m",
    "launch.cli",
    "run",
    "--dir",
    "JOB",
    "--snapshot-every",
    "20steps",
    "--quiet",
]
WAYS: dict[str, list[str]] = {
    "everstep, standby": [*EVERSTEP, *TORCHRUN, "SCRIPT"],
    "everstep, cold": [*EVERSTEP, "--standby", "off", *TORCHRUN, "SCRIPT"],
    "torchrun --max-restarts": [*TORCHRUN, "--max-restarts=KILLS", "--standalone", "SCRIPT"],
    "shell loop": ["bash", "-c", LOOP, "loop", *TORCHRUN, "--standalone", "SCRIPT"],
}


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[Run]:
    """A run that has made its first step."""
    run = Run(command)
    try:
        if run.until_steps(0.0, START) is None:
            sys.stderr.write((run.folder / "output").read_text())
            raise SystemExit(f"{command[0]} did not start")
        yield run
    finally:
        run.close()


def measure(name: str, kills: int, settle: float, limit: float) -> Result:
    """Kill rank 1 again and again; a run that does not come back is counted and replaced."""
    result = Result()
    while result.kills < kills:
        with started(WAYS[name]) as run:
            while result.kills < kills:
                wait(run, settle, standby=name.endswith("standby"))
                victim, killed = run.firsts()[1][0], time.time()
                os.kill(victim, signal.SIGKILL)
                result.kills += 1
                first = run.until_steps(killed, limit)
                if first is None:
                    print(f"{name}: did not come back in {limit:g} s", file=sys.stderr)
                    break
                result.seconds.append(first - killed)
                print(f"{name}: {first - killed:.3f} s", file=sys.stderr)
                note_phases(result, run, killed)
    return result


def wait(run: Run, settle: float, *, standby: bool) -> None:
    """Steps for a while; where there is a standby, until it is ready too."""
    time.sleep(settle)
    deadline = time.time() + START
    while standby and time.time() < deadline:
        facts = run.facts()
        started_at = max(fact.time for fact in facts if isinstance(fact, AttemptStarted))
        if any(isinstance(fact, StandbyReady) and fact.time > started_at for fact in facts):
            return
        time.sleep(0.05)


def note_phases(result: Result, run: Run, killed: float) -> None:
    """By the journal: to the end of the attempt (noticed, killed, reaped), to the gate, to the resume, to the step."""

    def found() -> list[Fact]:
        return [fact for fact in run.facts() if fact.time >= killed]

    deadline = time.time() + 5
    while run.facts() and not any(isinstance(f, FirstStep) for f in found()) and time.time() < deadline:
        time.sleep(0.05)
    last = killed
    phases: list[tuple[str, Callable[[Fact], bool]]] = [
        ("detection and teardown", lambda fact: isinstance(fact, AttemptEnded)),
        ("verdict, to the gate or the launch", lambda fact: isinstance(fact, AttemptStarted)),
        ("to where it resumes", lambda fact: isinstance(fact, Resumed)),
        ("restore and first step", lambda fact: isinstance(fact, FirstStep)),
    ]
    facts = found()
    for name, is_it in phases:
        when = next((fact.time for fact in facts if is_it(fact)), None)
        if when is not None:
            result.phases.setdefault(name, []).append(when - last)
            last = when


def p95(values: list[float]) -> float:
    """The smallest value that 95 % of the values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * 95 // 100) - 1)]


def main() -> int:
    """Measure each way, print one table; 0 when every goal is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="for each way")
    parser.add_argument(
        "--settle", type=float, default=1.0, help="seconds of steps between two kills, at least"
    )
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds after which a run has not come back"
    )
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    results = {
        name: measure(name, arguments.kills, arguments.settle, arguments.limit) for name in arguments.only
    }
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {before:.1f} before, "
        f"{os.getloadavg()[0]:.1f} after; 2 ranks, SIGKILL of rank 1; seconds from the kill to the first step\n"
    )
    print(f"{'':<26}{'median':>9}{'p95':>9}{'max':>9}{'came back':>13}")
    for name, result in results.items():
        cells = (
            "".join(f"{value:>9.3f}" for value in spread(result.seconds)) if result.seconds else f"{'':>27}"
        )
        print(f"{name:<26}{cells}{f'{len(result.seconds)} of {result.kills}':>13}")
    for name, result in results.items():
        if result.phases:
            print(f"\n{name}, by phase:")
            for phase, seconds in result.phases.items():
                print(f"  {phase:<36}" + "".join(f"{value:>9.3f}" for value in spread(seconds)))
    return judge(results)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 95th percentile, maximum."""
    return statistics.median(values), p95(values), max(values)


def judge(results: dict[str, Result]) -> int:
    """Compare with the goals, as far as what they speak of was measured."""
    ours = results.get("everstep, standby")
    peers = [r for name, r in results.items() if not name.startswith("everstep") and r.seconds]
    missed = [name for name, r in results.items() if name.startswith("everstep") and len(r.seconds) < r.kills]
    if ours and ours.seconds:
        if p95(ours.seconds) > GOAL:
            missed.append(f"p95 of {GOAL} s")
        if peers:
            best = min(statistics.median(peer.seconds) for peer in peers)
            ratio = best / statistics.median(ours.seconds)
            print(f"\nthe best peer : everstep with its standby = {ratio:.1f} : 1 (medians)")
            if ratio < GOAL_RATIO:
                missed.append(f"{GOAL_RATIO:g} times faster than the best peer")
    print(f"missed: {'; '.join(missed)}" if missed else "every goal is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
