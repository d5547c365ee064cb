"""What the supervisor itself costs, beside torchrun's own agent process in the same run.

A real training (two ranks) runs under ``everstep run``; its supervisor and the torchrun agent that it started are
read from /proc: what is mapped, anonymous memory, CPU time over a stretch of watching. Twice: watching only, and with a
snapshot made durable every few steps. Start-up is from the birth of ``everstep`` to the birth of torchrun, both from
the kernel's process table (a resolution of 10 ms). What the step loop costs is timed in a script that does nothing else: the
steps of a Session under ``everstep run``, of which none is a save point, beside those of a plain generator. Exit code 1 when a
goal is missed.

    python benchmarks/supervisor_cost.py [--seconds 20] [--starts 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
EVERSTEP = Path(sys.executable).parent / "everstep"
TRAINING = [
    "torchrun",
    "--nproc-per-node=2",
    str(HERE.parent / "examples" / "gpt_ddp.py"),
    "--steps",
    "1000000",
]
WATCHING = ["--snapshot-every", "never", "--checkpoint-every", "never"]
SAVING = ["--snapshot-every", "20steps", "--checkpoint-every", "20steps"]
DEADLINE = 120.0

GOAL_MEMORY = 60.0  # MB, anonymous
GOAL_CPU = 1.0  # percent of one core, watching
GOAL_START = 0.5  # seconds
GOAL_STEP = 1.0  # microseconds

LOOPS = """
import json, os, statistics, time
from supervisor.training import Session

def plain(total):
    yield from range(total)

def each(loop, count):
    started = time.perf_counter()
    for _ in loop:
        pass
    return (time.perf_counter() - started) / count * 1e6

with Session() as session:
    for _ in session.steps(1000):
        pass
    found = [(each(session.steps((n + 1) * 100_000), 100_000 - 1000 * (n == 0)), each(plain(100_000), 100_000)) for n in range(9)]
ours, bare = (statistics.median(column) for column in zip(*found))
with open(os.environ["EVERSTEP_COST"], "w") as file:
    json.dump([ours, bare], file)
"""


@dataclass(frozen=True)
class Cost:
    """What one process costs over a stretch of time."""

    torch: bool
    anonymous: float  # MB
    peak: float  # MB, resident, over its life
    cpu: float  # percent of one core


@contextlib.contextmanager
def training(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a directory of its own, stopped and cleared away afterwards."""
    with tempfile.TemporaryDirectory(prefix="everstep-cost-") as folder:
        log = Path(folder) / "output"
        command: list[str | Path] = [
            EVERSTEP,
            "run",
            "--dir",
            Path(folder) / "job",
            "--grace",
            "10s",
            "--quiet",
            *options,
            *TRAINING,
        ]
        with log.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as run:
            try:
                yield run
            except LookupError:
                sys.stderr.write(log.read_text())
                raise
            finally:
                run.terminate()
                run.wait(DEADLINE)


def agent_of(run: subprocess.Popen[bytes]) -> psutil.Process:
    """The torchrun process below the supervisor. Raises LookupError when none appears."""
    supervisor = psutil.Process(run.pid)
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and run.poll() is None:
        for child in supervisor.children():
            return child
        time.sleep(0.01)
    raise LookupError("everstep started no torchrun")


def wait_for_steps(run: subprocess.Popen[bytes], agent: psutil.Process) -> None:
    """Until both workers train: each has spent a few seconds of CPU time by then. Raises LookupError."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and run.poll() is None:
        workers = agent.children()
        if len(workers) == 2 and all(busy(worker) > 6 for worker in workers):
            return
        time.sleep(0.1)
    raise LookupError("the training did not get going")


def busy(process: psutil.Process) -> float:
    """Seconds of CPU time so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def cost(process: psutil.Process, cpu_before: float, seconds: float) -> Cost:
    """Of a process that had used ``cpu_before`` seconds of CPU time ``seconds`` ago."""
    proc = Path("/proc") / str(process.pid)
    anonymous = re.search(r"^Anonymous:\s+(\d+) kB", (proc / "smaps_rollup").read_text(), re.MULTILINE)
    peak = re.search(r"^VmHWM:\s+(\d+) kB", (proc / "status").read_text(), re.MULTILINE)
    assert anonymous is not None
    assert peak is not None
    return Cost(
        torch="libtorch" in (proc / "maps").read_text(),
        anonymous=int(anonymous[1]) * 1024 / 1e6,
        peak=int(peak[1]) * 1024 / 1e6,
        cpu=100 * (busy(process) - cpu_before) / seconds,
    )


def measure(seconds: float, *options: str) -> tuple[Cost, Cost]:
    """The supervisor's cost and torchrun's, over the same stretch of the same run."""
    with training(*options) as run:
        supervisor, agent = psutil.Process(run.pid), agent_of(run)
        wait_for_steps(run, agent)
        before, start = (busy(supervisor), busy(agent)), time.monotonic()
        time.sleep(seconds)
        passed = time.monotonic() - start
        return cost(supervisor, before[0], passed), cost(agent, before[1], passed)


def start_up() -> float:
    """Seconds from the birth of ``everstep`` to that of torchrun."""
    with training(*WATCHING) as run:
        agent = agent_of(run)
        return float(agent.create_time() - psutil.Process(run.pid).create_time())


def step_loop() -> tuple[float, float]:
    """Microseconds for a step that is no save point: of a Session's, and of a plain generator's."""
    with tempfile.TemporaryDirectory(prefix="everstep-cost-") as folder:
        script, found = Path(folder, "loops.py"), Path(folder, "found")
        script.write_text(LOOPS)
        command: list[str | Path] = [
            EVERSTEP,
            "run",
            "--dir",
            Path(folder, "job"),
            "--quiet",
            "--standby",
            "off",
            *WATCHING,
        ]
        environment = {**os.environ, "EVERSTEP_COST": str(found)}
        subprocess.run([*command, sys.executable, script], env=environment, check=True, timeout=DEADLINE)
        ours, plain = json.loads(found.read_text())
        return ours, plain


def main() -> int:
    """Measure, print one table; 0 when every goal is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to watch, twice")
    parser.add_argument("--starts", type=int, default=5, help="how many starts to time")
    arguments = parser.parse_args()
    os.environ["PATH"] = f"{EVERSTEP.parent}{os.pathsep}{os.environ.get('PATH', '')}"

    starts = [start_up() for _ in range(arguments.starts)]
    watching, agent = measure(arguments.seconds, *WATCHING)
    saving, _ = measure(arguments.seconds, *SAVING)
    step, plain = step_loop()
    start = statistics.median(starts)

    def row(what: str, goal: str, *cells: str) -> None:
        print(f"{what:<34}" + "".join(f"{cell:>22}" for cell in (*cells, goal)))

    def yes(torch: bool) -> str:
        return "yes" if torch else "no"

    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.platform()}")
    print(
        f"two ranks of {Path(TRAINING[2]).name}, {arguments.seconds:g} s each; saving: {' '.join(SAVING)}\n"
    )
    row("", "goal", "everstep, watching", "everstep, saving", "torchrun's agent")
    row("torch in its address space", "no", yes(watching.torch), yes(saving.torch), yes(agent.torch))
    row(
        "anonymous memory, MB",
        f"< {GOAL_MEMORY:g}",
        *(f"{each.anonymous:.1f}" for each in (watching, saving, agent)),
    )
    row("resident at its peak, MB", "", *(f"{each.peak:.1f}" for each in (watching, saving, agent)))
    row(
        "CPU, % of one core",
        f"< {GOAL_CPU:g} watching",
        *(f"{each.cpu:.2f}" for each in (watching, saving, agent)),
    )
    row("start to torchrun's birth, s", f"< {GOAL_START:g}", f"{start:.2f}", "", "")
    print(f"{'':<34}{f'{min(starts):.2f} to {max(starts):.2f}, median of {len(starts)}':>22}")
    row("a step that saves nothing, µs", f"< {GOAL_STEP:g}", f"{step:.2f}", "", f"a generator's: {plain:.2f}")
    met = (
        step < GOAL_STEP
        and not watching.torch
        and not saving.torch
        and max(watching.anonymous, saving.anonymous) < GOAL_MEMORY
        and watching.cpu < GOAL_CPU
        and start < GOAL_START
    )
    print(f"\nanonymous memory, everstep : torchrun's agent = 1 : {agent.anonymous / watching.anonymous:.1f}")
    print("every goal is met" if met else "A GOAL IS MISSED")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
