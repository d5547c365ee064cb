"""Useful steps under failures: the example GPT with a kill or an exception every 10 to 20 seconds, everstep and torchrun.

*Goodput* is the number of the last completed step at the end, divided by the steps that the same training makes in the same time when nothing
is saved, nothing supervises it and nothing fails. That rate is measured before and after each run, because a machine that
others use is faster now and slower then. The schedule of failures (when, which, which rank) follows from ``--seed`` and is the
same for all. A failure is put off until the job makes steps again.

- everstep, with its defaults but ``--snapshot-every 10steps``, and a Session.
- torchrun ``--max-restarts`` with ``dcp.async_save`` every N steps, for several N; the best one counts. If it does not come
  back within ``--patience`` seconds it is started anew by us.

Beside everstep's goodput stands what its own simulation says of it (*predicted*), from the costs in the journal of the first half of the
run (medians) and the schedule. Goal: within 3 points.

Beside them: the same with ranks that are stopped (SIGSTOP) and must be found to hang, by a limit of ``--hang`` seconds; torchrun would
wait for half an hour. And what supervision costs without failures: a supervised run and two plain ones live side by side, all but one
of them stopped at any time, and make steps for half a second each, in an order that changes. The second plain one tells what this way of measuring
finds where there is nothing to be found. Medians of the rounds, and the interval in which the median lies with 95 % (by order
statistics).

Ranks: half of the cores, at least one: what is launched beside the training has a core, as on a GPU node. Exit code 1 when a goal is
missed.

    python benchmarks/goodput.py [--seconds 180] [--seed 0] [--ranks N] [--only cost] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import platform
import random
import signal
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import EVERSTEP, MANY, Run
from supervisor.decide import lifecycle, measured, scenario, simulation
from supervisor.model import Fact, Limits, StandbyReady

SCRIPT: Final = str(Path(__file__).parent / "gpt_kept.py")
GAP: Final = (10.0, 20.0)  # seconds between two failures
QUIET_END: Final = 8.0  # seconds without failures at the end
START: Final = 180.0
GOAL, GOAL_COST, GOAL_PREDICTION = 0.95, 0.005, 0.03
MANY_FAILURES: Final = 1_000_000
SNAPSHOT_STEPS: Final = 10  # of ours


@dataclass(frozen=True)
class Strike:
    """One failure of the schedule."""

    at: float  # seconds after the beginning
    kind: str
    rank: int


@dataclass(frozen=True)
class Result:
    """What a run has come to."""

    goodput: float
    strikes: int
    restarted: int  # by us
    ledger: str = ""
    predicted: float | None = None


def schedule(seed: int, seconds: float, kinds: Sequence[str], ranks: int) -> list[Strike]:
    """Failures at random times, the same for the same seed."""
    draw = random.Random(seed)
    strikes, at = [], draw.uniform(*GAP)
    while at < seconds - QUIET_END:
        strikes.append(Strike(at, draw.choice(list(kinds)), draw.randrange(ranks)))
        at += draw.uniform(*GAP)
    return strikes


class Training(Run):
    """The script in one way of running it."""

    def __init__(self, words: Sequence[str], ranks: int, keep: Sequence[str]) -> None:
        self.ranks = ranks
        command = [f"--nproc-per-node={ranks}" if word == "RANKS" else word for word in words]
        super().__init__([*command, SCRIPT, "--keep", *keep], "")

    def restart(self) -> None:
        """End it and start it anew, in the same folder."""
        self.end()
        self.start()

    @property
    def step(self) -> int:
        """Completed steps of the slowest rank of the present attempt."""
        return self.newest[0]

    @property
    def newest(self) -> tuple[int, float]:
        """Likewise, and the second in which that step was completed, on the monotonic clock."""
        try:
            step, nanoseconds = min(self._read(rank) for rank in range(self.ranks))
        except (OSError, struct.error):
            return 0, 0.0
        return step, nanoseconds / 1e9

    def _read(self, rank: int) -> tuple[int, int]:
        step, nanoseconds = struct.unpack("QQ", (self.folder / f"step-{rank}").read_bytes())
        return int(step), int(nanoseconds)

    def pids(self) -> list[str]:
        """The processes of its ranks, once there are."""
        with contextlib.suppress(OSError):
            return [(self.folder / f"pid-{rank}").read_text() for rank in range(self.ranks)]
        return []

    def until(self, found: Callable[[], bool], limit: float) -> bool:
        """Wait; whether it has come to pass."""
        deadline = time.monotonic() + limit
        while not found():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def strike(self, one: Strike) -> None:
        """Have it fail."""
        if one.kind == "exception":
            (self.folder / "raise").touch()
        else:
            signum = signal.SIGSTOP if one.kind == "stop" else signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.pids()[one.rank]), signum)


TORCHRUN: Final = ("torchrun", "RANKS")
PLAIN: Final = (*TORCHRUN, "--standalone")
OURS: Final = (*EVERSTEP, "--snapshot-every", f"{SNAPSHOT_STEPS}steps", "--max-failures", str(MANY_FAILURES))


@contextlib.contextmanager
def alive(words: Sequence[str], ranks: int, *keep: str) -> Iterator[Training]:
    """A training that makes steps."""
    run = Training(words, ranks, keep)
    try:
        if not run.until(lambda: run.step > 0, START):
            sys.stderr.write(run.output)
            raise SystemExit(f"{words[0]} did not start")
        yield run
    finally:
        run.close()


def undisturbed(ranks: int, seconds: float) -> float:
    """Steps a second of the training alone."""
    with alive(PLAIN, ranks, "nothing") as run:
        time.sleep(2.0)
        begun, step = time.monotonic(), run.step
        time.sleep(seconds)
        return (run.step - step) / (time.monotonic() - begun)


def disturbed(run: Training, strikes: Sequence[Strike], seconds: float, patience: float) -> tuple[int, int]:
    """Steps made under the schedule, and how often it had to be started anew."""
    begun, first, restarted = time.monotonic(), run.step, 0
    for one in strikes:
        time.sleep(max(0.0, begun + one.at - time.monotonic()))
        before = run.pids()
        run.strike(one)
        back = lambda before=before: run.pids() != before and run.step > 0  # noqa: E731
        if not run.until(back, patience):
            restarted += 1
            run.restart()
            run.until(back, START)
    time.sleep(max(0.0, begun + seconds - time.monotonic()))
    scale = seconds / (time.monotonic() - begun)  # a recovery may have gone over the end
    return round((run.step - first) * scale), restarted


def predicted(facts: Sequence[Fact], strikes: Sequence[Strike], begun: float, seconds: float) -> int:
    """Steps from ``begun`` on, in Unix seconds, by what the first half of the run has cost."""
    learned = measured.measure(fact for fact in facts if fact.time < begun + seconds / 2)
    before = begun - facts[0].time
    costs = scenario.Costs(**learned.costs)
    plan = scenario.Plan(
        seconds=before + seconds,
        snapshot_every=SNAPSHOT_STEPS * costs.step,
        limits=Limits(max_failures=MANY_FAILURES),
    )
    blows = [
        scenario.Strike(before + one.at, scenario.Blow.HANG if one.kind == "stop" else scenario.Blow.PROCESS)
        for one in strikes
    ]
    outcome = simulation.simulate(plan, costs, blows)
    return outcome.record.furthest_step


def ledger_of(facts: Sequence[Fact]) -> str:
    """Where the seconds have gone, by everstep's own account."""
    spent = lifecycle.fold(facts).spent
    parts = {
        name: seconds
        for name, seconds in vars(spent).items()
        if isinstance(seconds, float) and seconds >= 0.05
    }
    return ", ".join(f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in parts.items())


@dataclass(frozen=True)
class Cost:
    """Steps a second of one run to those of a plain one, less 1, by round."""

    ratios: list[float]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        low, high = interval(self.ratios)
        return f"{self.median:+.2%} (95 %: {low:+.2%} to {high:+.2%})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which two of them the median of all such values lies with 95 %: counted from both ends, whatever their distribution."""
    ordered, count = sorted(values), len(values)
    chance = [math.comb(count, below) / 2**count for below in range(count // 2)]
    apart = sum(total <= 0.025 for total in itertools.accumulate(chance))
    return ordered[max(0, apart - 1)], ordered[min(count - 1, count - apart)]


def supervision(ranks: int, rounds: int, seconds: float) -> tuple[Cost, Cost]:
    """Of a supervised run, and of another plain one."""
    with (
        alive((*EVERSTEP, *TORCHRUN), ranks, "session") as ours,
        alive(PLAIN, ranks, "nothing") as plain,
        alive(PLAIN, ranks, "nothing") as other,
    ):
        ours.until(lambda: any(isinstance(fact, StandbyReady) for fact in ours.facts()), START)
        runs = [ours, plain, other]
        for run in runs:
            _signal(run, signal.SIGSTOP)
        found: list[list[float]] = []
        for order in itertools.islice(itertools.cycle(itertools.permutations(runs)), rounds):
            rates = {run: _rate(run, seconds) for run in order}
            found.append([rates[run] / rates[plain] - 1 for run in (ours, other)])
        for run in runs:
            _signal(run, signal.SIGCONT)
    supervised, same = zip(*found, strict=True)
    return Cost(list(supervised)), Cost(list(same))


def _rate(run: Training, seconds: float) -> float:
    """Steps a second while it alone is let go, between two steps; the one in which it was stopped does not count."""
    before = run.step
    _signal(run, signal.SIGCONT)
    run.until(lambda: run.step > before + 1, START)
    step, begun = run.newest
    time.sleep(seconds)
    run.until(lambda: run.step > step, START)
    last, ended = run.newest
    _signal(run, signal.SIGSTOP)
    return (last - step) / (ended - begun)


def _signal(run: Run, signum: signal.Signals) -> None:
    for process in run.tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def main() -> int:
    """Run all of it, print one table; 0 when every goal is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument(
        "--every",
        type=int,
        nargs="+",
        default=[25, 100, 400],
        help="steps between saves with dcp, to choose from",
    )
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for torchrun to come back")
    parser.add_argument(
        "--hang", type=float, default=5.0, help="seconds after which a rank that is stopped hangs"
    )
    parser.add_argument(
        "--rounds", type=int, default=150, help="for the cost of supervision, of half a second each run"
    )
    parser.add_argument("--only", choices=["cost"], help="the cost of supervision only")
    parser.add_argument("--quick", action="store_true", help="one minute each, one N")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.every, arguments.rounds = 60.0, [100], 24
    ranks, seconds = arguments.ranks, arguments.seconds
    if arguments.only == "cost":
        return told(print_cost(ranks, arguments.rounds))
    reference = min(30.0, seconds / 4)
    rates = [undisturbed(ranks, reference)]

    def measure(name: str, words: Sequence[str], kinds: Sequence[str], *keep: str) -> Result:
        strikes = schedule(arguments.seed, seconds, kinds, ranks)
        patience = arguments.patience if words[0] == "torchrun" else START
        with alive(words, ranks, *keep) as run:
            begun = time.time()
            made, restarted = disturbed(run, strikes, seconds, patience)
            facts = run.facts()
        rates.append(undisturbed(ranks, reference))
        possible = seconds * statistics.mean(rates[-2:])
        print(f"{name}: {made} steps, {made / possible:.3f}", file=sys.stderr)
        if not facts:
            return Result(made / possible, len(strikes), restarted)
        foreseen = predicted(facts, strikes, begun, seconds) / possible
        return Result(made / possible, len(strikes), restarted, ledger_of(facts), foreseen)

    usual = ("kill", "exception")
    results = {"everstep": measure("everstep", (*OURS, *TORCHRUN), usual, "session")}
    peers = {
        every: measure(f"torchrun, every {every}", (*PLAIN, MANY), usual, "dcp", "--every", str(every))
        for every in arguments.every
    }
    best = max(peers, key=lambda every: peers[every].goodput)
    results[f"torchrun, dcp.async_save every {best} steps"] = peers[best]
    hung = (*OURS, "--hang-floor", f"{arguments.hang:g}s", *TORCHRUN)
    results[f"everstep, ranks stopped, --hang-floor {arguments.hang:g}s"] = measure(
        "stopped", hung, ("stop",), "session"
    )
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {ranks} ranks; seed {arguments.seed}, "
        f"{seconds:g} s each, a failure every {GAP[0]:g} to {GAP[1]:g} s; undisturbed {min(rates):.1f} to {max(rates):.1f} steps/s\n"
    )
    print(f"{'':<48}{'goodput':>9}{'predicted':>11}{'failures':>10}{'started anew by us':>20}")
    for name, result in results.items():
        foreseen = "" if result.predicted is None else f"{result.predicted:.3f}"
        print(f"{name:<48}{result.goodput:>9.3f}{foreseen:>11}{result.strikes:>10}{result.restarted:>20}")
    for name, result in results.items():
        if result.ledger:
            print(f"\n{name}, seconds: {result.ledger}")
    others = ", ".join(f"every {every}: {result.goodput:.3f}" for every, result in peers.items())
    print(f"\ntorchrun with dcp.async_save {others}")
    missed = [f"goodput {GOAL}"] if results["everstep"].goodput < GOAL else []
    wrong = max(abs(one.predicted - one.goodput) for one in results.values() if one.predicted is not None)
    missed += [f"predicted within {GOAL_PREDICTION:g}"] if wrong > GOAL_PREDICTION else []
    return told(missed + print_cost(ranks, arguments.rounds))


def print_cost(ranks: int, rounds: int) -> list[str]:
    """What supervision costs; the goal that was missed."""
    ours, same = supervision(ranks, rounds, 0.5)
    print(
        f"without failures, steps of a supervised run to those of a plain one: {ours}; of another plain one: {same}; {rounds} rounds"
    )
    return [f"cost below {GOAL_COST:.1%}"] if -ours.median > GOAL_COST else []


def told(missed: Sequence[str]) -> int:
    """Say what was missed; the exit code."""
    print(f"missed: {'; '.join(missed)}" if missed else "every goal is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
