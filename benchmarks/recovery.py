"""From the failure of a rank to the first step of the next attempt: everstep with its standby and cold, and its peers.

The same tiny script (two ranks, gloo, DDP, a state file of its own so that every way of starting it resumes), the same
SIGKILL of rank 1, in one run on one machine. A kill comes when the attempt has made steps for ``--settle`` seconds, in
which the standby gets ready; a peer that has not made a step ``--limit`` seconds after the kill has not come back, and is
started anew. One row is for rank 1 raising an exception instead. The peers are torchrun's own restarts, NVIDIA's ft_launcher
(``peers.py`` installs it the first time) and a loop of the shell. Exit code 1 when a goal is missed.

    python benchmarks/recovery.py [--kills 20] [--only NAME …] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import EVERSTEP, LOOP, MANY, TORCHRUN, Run, ft_launcher
from supervisor.model import AttemptEnded, AttemptStarted, Fact, FirstStep, Resumed, StandbyReady

FT_OPTIONS = ("--standalone", "--ignore-missing-fault-tol-cfg")
START = 120.0  # seconds for a first step from nothing
GOAL = 0.15  # seconds, p95, with the standby
GOAL_RATIO = 12.0  # times faster than the best peer

SCRIPT = """
import os, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
folder, rank = os.environ["BENCH"], int(os.environ["RANK"])
last = int(os.environ["WORLD_SIZE"]) - 1
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
        write(f"first-{rank}-{os.getpid()}")
    if rank == last and os.path.exists(f"{folder}/raise"):
        os.unlink(f"{folder}/raise")
        write("raised")
        raise RuntimeError(f"at {time.time()}")
    time.sleep(0.01)
def write(name):
    with open(f"{folder}/tmp-{rank}", "w") as file:
        file.write(repr(time.time()))
    os.rename(f"{folder}/tmp-{rank}", f"{folder}/{name}")
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


@dataclass
class Result:
    """What one way of restarting has shown."""

    seconds: list[float] = field(default_factory=list)
    kills: int = 0
    phases: dict[str, list[float]] = field(default_factory=dict)


EVERSTEP_SAVING = (*EVERSTEP, "--snapshot-every", "20steps")
STANDBY, RAISED, COLD = "everstep, standby", "everstep, standby, raised", "everstep, cold"
WAYS: dict[str, Callable[[], tuple[str | Path, ...]]] = {
    STANDBY: lambda: (*EVERSTEP_SAVING, *TORCHRUN, "SCRIPT"),
    RAISED: lambda: (*EVERSTEP_SAVING, *TORCHRUN, "SCRIPT"),
    COLD: lambda: (*EVERSTEP_SAVING, "--standby", "off", *TORCHRUN, "SCRIPT"),
    "torchrun --max-restarts": lambda: (*TORCHRUN, MANY, "--standalone", "SCRIPT"),
    "ft_launcher": lambda: (ft_launcher(), *TORCHRUN[1:], MANY, *FT_OPTIONS, "SCRIPT"),
    "shell loop": lambda: (*LOOP, "SCRIPT"),
}
QUICK = (STANDBY, RAISED, "ft_launcher", "torchrun --max-restarts")


class Trial(Run):
    """The script above, started in one of the ways."""

    def __init__(self, name: str) -> None:
        super().__init__(WAYS[name](), SCRIPT)
        self._raises = name == RAISED

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

    def strike(self) -> float:
        """Have rank 1 fail; when that was."""
        if not self._raises:
            victim, struck = self.firsts()[1][0], time.time()
            os.kill(victim, signal.SIGKILL)
            return struck
        (self.folder / "raise").touch()
        raised = self.folder / "raised"
        deadline = time.time() + START
        while not raised.exists() and time.time() < deadline:
            time.sleep(0.001)
        struck = float(raised.read_text())
        raised.unlink()
        return struck


@contextlib.contextmanager
def started(name: str) -> Iterator[Trial]:
    """A run that has made its first step."""
    run = Trial(name)
    try:
        if run.until_steps(0.0, START) is None:
            sys.stderr.write(run.output)
            raise SystemExit(f"{name} did not start")
        yield run
    finally:
        run.close()


def measure(name: str, kills: int, settle: float, limit: float) -> Result:
    """Kill rank 1 again and again; a run that does not come back is counted and replaced."""
    result = Result()
    while result.kills < kills:
        with started(name) as run:
            while result.kills < kills:
                wait(run, settle, standby=name in (STANDBY, RAISED))
                killed = run.strike()
                result.kills += 1
                first = run.until_steps(killed, limit)
                if first is None:
                    print(f"{name}: did not come back in {limit:g} s", file=sys.stderr)
                    break
                result.seconds.append(first - killed)
                print(f"{name}: {first - killed:.3f} s", file=sys.stderr)
                note_phases(result, run, killed)
    return result


def wait(run: Trial, settle: float, *, standby: bool) -> None:
    """Steps for a while; where there is a standby, until it is ready too."""
    time.sleep(settle)
    deadline = time.time() + START
    while standby and time.time() < deadline:
        facts = run.facts()
        started_at = max(fact.time for fact in facts if isinstance(fact, AttemptStarted))
        if any(isinstance(fact, StandbyReady) and fact.time > started_at for fact in facts):
            return
        time.sleep(0.05)


def note_phases(result: Result, run: Trial, killed: float) -> None:
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
    parser.add_argument("--kills", type=int, default=20, help="for each way")
    parser.add_argument("--quick", action="store_true", help=f"3 kills each of {', '.join(QUICK)}")
    parser.add_argument(
        "--settle", type=float, default=1.0, help="seconds of steps between two kills, at least"
    )
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds after which a run has not come back"
    )
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills, arguments.limit, arguments.only = 3, 20.0, list(QUICK)
    before = os.getloadavg()[0]
    results = {
        name: measure(name, arguments.kills, arguments.settle, arguments.limit) for name in arguments.only
    }
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {before:.1f} before, "
        f"{os.getloadavg()[0]:.1f} after; 2 ranks; seconds from the SIGKILL (or exception) of rank 1 to the first step\n"
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
