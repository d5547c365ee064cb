"""What the loss of a host costs a job on several: everstep and torchrun's own elasticity, on the same hosts, with the same training.

    python benchmarks/nodes.py [--quick] [--cap 180]
    python benchmarks/nodes.py --relaunch 10 [--hosts 2]

Hosts are namespaces with a network, process ids and memory of their own (``tests/hosts/lab.py``; needs root). One of them loses its
power while the training runs: nobody is told. Measured is the time from then until rank 0 has completed its first step after it. With torchrun
that is ``--nnodes=2:3`` with the c10d rendezvous and its defaults, and the training has no checkpoint to load. ``--quick``: everstep alone.

``--relaunch N``: instead of that, the rank of a node that does not lead is killed N times. Measured is the time from the signal until the last rank of all
nodes has completed its first step after it, with the standby ready and without a standby.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from supervisor.model import AttemptStarted, CheckpointCommitted, FirstStep
from tests.e2e.harness import BIN, ROOT, environment
from tests.hosts.lab import INTERFACE, Host, Lab, Process
from tests.hosts.nodes import Nodes

PROGRAM = """
import os, sys, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(256, 256))
optimizer = torch.optim.AdamW(model.parameters())
def step():
    optimizer.zero_grad()
    model(torch.ones(4, 256)).sum().backward()
    optimizer.step()
    time.sleep(0.05)
    if dist.get_rank() == 0:
        with open(sys.argv[1], "a") as file:
            file.write(f"{time.time()} {dist.get_world_size()}\\n")
if "EVERSTEP_DIR" in os.environ:
    from supervisor.training import Session
    with Session(model=model, optimizer=optimizer) as session:
        for _ in session.steps(100000):
            step()
else:
    while True:
        step()
"""
STEADY = 40  # steps before the host is lost
OPTIONS = ("--snapshot-every", "10steps", "--checkpoint-every", "never")


class Watch:
    """The steps that rank 0 has completed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def times(self) -> list[float]:
        """Unix seconds of each."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [float(line.split()[0]) for line in lines if line.count(" ") == 1]

    def until(self, found: Callable[[list[float]], float | None], cap: float) -> float | None:
        """What is ``found`` in them; None once ``cap`` seconds have passed."""
        limit = time.monotonic() + cap
        while time.monotonic() < limit:
            if (value := found(self.times())) is not None:
                return value
            time.sleep(0.02)
        return None


def lose(host: Host, watch: Watch, cap: float, back: Callable[[], None] | None = None) -> float | None:
    """Seconds from the crash of ``host`` to the next step. ``back``: what is done once it is down.

    A step that was being made counts only if none is missing before it: it must come a second later than the one before.
    """
    if watch.until(lambda times: 0.0 if len(times) >= STEADY else None, 300.0) is None:
        raise SystemExit("the training does not start")
    lost = time.time()
    host.crash()
    if back is not None:
        back()

    def first_after(times: list[float]) -> float | None:
        gaps = [later for before, later in itertools.pairwise(times) if later > lost and later - before > 1.0]
        return gaps[0] - lost if gaps else None

    return watch.until(first_after, cap)


def everstep(hosts: int, size: str, *, restart: bool = False, cap: float = 180.0) -> float | None:
    """The host that is lost is the third."""
    with tempfile.TemporaryDirectory(prefix="everstep-nodes-") as folder, Lab(hosts) as lab:
        job = Nodes(lab, Path(folder) / "job")
        script, watch = _script(Path(folder)), Watch(Path(folder) / "steps")
        third = lab.hosts[2]

        def begin(host: Host) -> None:
            job.begin(host, watch.path, options=("--nnodes", size, *OPTIONS), script=script)

        def back() -> None:
            third.boot()
            begin(third)

        for host in lab.hosts[:3]:
            begin(host)
        if hosts > 3:
            watch.until(lambda times: 0.0 if times else None, 300.0)
            begin(lab.hosts[3])
        return lose(third, watch, cap, back if restart else None)


def torchrun(cap: float) -> float | None:
    """``--nnodes=2:3``, c10d, defaults."""
    with tempfile.TemporaryDirectory(prefix="everstep-nodes-") as folder, Lab(3) as lab:
        script, watch = _script(Path(folder)), Watch(Path(folder) / "steps")
        runs: list[Process] = []
        for host in lab.hosts:
            argv: Sequence[object] = [
                BIN / "torchrun", "--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d",
                f"--rdzv-endpoint={lab.hosts[0].address}:29400", "--rdzv-id=1", script, watch.path,
            ]  # fmt: skip
            env = environment() | {"GLOO_SOCKET_IFNAME": INTERFACE}
            runs.append(host.popen(argv, env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return lose(lab.hosts[2], watch, cap)


def notice() -> float:
    """Seconds from SIGTERM on one of three nodes to the checkpoint of all."""
    with tempfile.TemporaryDirectory(prefix="everstep-nodes-") as folder, Lab(3) as lab:
        job = Nodes(lab, Path(folder) / "job")
        script, watch = _script(Path(folder)), Watch(Path(folder) / "steps")
        for host in lab.hosts:
            job.begin(host, watch.path, options=("--nnodes", 3, *OPTIONS), script=script)
        watch.until(lambda times: 0.0 if len(times) >= STEADY else None, 300.0)
        began = time.time()
        job.runs[lab.hosts[2].name].send_signal(signal.SIGTERM)
        job.codes(*lab.hosts)
        return max(fact.time for fact in job.facts(CheckpointCommitted)) - began


def _has_made(steps: int, times: list[float]) -> float | None:
    return 0.0 if len(times) >= steps else None


def _is_of(attempt: int, fact: FirstStep) -> bool:
    return fact.attempt == attempt


def relaunches(hosts: int, times: int, standby: bool) -> list[float]:
    """Seconds from SIGKILL for the rank of the last node to the first step of all."""
    found = []
    with tempfile.TemporaryDirectory(prefix="everstep-nodes-") as folder, Lab(hosts) as lab:
        job = Nodes(lab, Path(folder) / "job")
        script, watch = _script(Path(folder)), Watch(Path(folder) / "steps")
        options = (
            "--nnodes",
            hosts,
            "--standby",
            "on" if standby else "off",
            *OPTIONS,
            "--max-failures",
            times,
        )
        for host in lab.hosts:
            job.begin(host, watch.path, options=options, script=script)
        job.until_fact(FirstStep)
        for attempt in range(times):
            if standby:
                job.until_standby(*lab.hosts)
            steps = len(watch.times())
            watch.until(partial(_has_made, steps + STEADY), 300.0)
            killed = job.kill_rank(lab.hosts[-1], attempt)
            found.append(job.until_fact(FirstStep, partial(_is_of, attempt + 1)).time - killed)
        used = [fact.standby for fact in job.facts(AttemptStarted)][1:]
        if used != [standby] * times:
            print(f"begun from the standby: {used}", file=sys.stderr)
        for host in lab.hosts:
            job.runs[host.name].send_signal(signal.SIGINT)
        job.codes(*lab.hosts)
    return found


def _print_relaunches(hosts: int, times: int) -> None:
    print(
        f"{'a rank is killed on another node: seconds to the first step of all':<70} {'median':>7} {'p95':>7} {'longest':>7}"
    )
    for standby in (True, False):
        seconds = sorted(relaunches(hosts, times, standby))
        p95 = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
        name = f"{hosts} hosts, {'from the standby' if standby else 'cold'}, {len(seconds)} times"
        print(f"{name:<70} {statistics.median(seconds):>7.2f} {p95:>7.2f} {seconds[-1]:>7.2f}", flush=True)


def _script(folder: Path) -> Path:
    script = folder / "train.py"
    script.write_text(PROGRAM)
    return script


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without torchrun, whose time-outs take minutes")
    parser.add_argument("--cap", type=float, default=180.0, help="seconds after which a run counts as lost")
    parser.add_argument(
        "--relaunch", type=int, metavar="N", help="kill a rank on a node that does not lead N times"
    )
    parser.add_argument("--hosts", type=int, default=2, help="for --relaunch")
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} cores for all hosts; load before: {os.getloadavg()[0]:.1f}; lease 5 s",
        file=sys.stderr,
    )
    if options.relaunch:
        _print_relaunches(options.hosts, options.relaunch)
        return
    print(f"{'a host of three is lost: seconds to the next step':<60} {'s':>7}", flush=True)

    def row(name: str, seconds: float | None) -> None:
        print(
            f"{name:<60} {f'{seconds:.1f}' if seconds is not None else f'> {options.cap:.0f}':>7}", flush=True
        )

    row("everstep, --nnodes 2:3, goes on with two", everstep(3, "2:3", cap=options.cap))
    row("everstep, --nnodes 3, a spare takes its place", everstep(4, "3", cap=options.cap))
    row(
        "everstep, --nnodes 3, the host boots and is started again",
        everstep(3, "3", restart=True, cap=options.cap),
    )
    if not options.quick:
        row("torchrun, --nnodes=2:3, c10d", torchrun(options.cap))
    print(f"{'SIGTERM on one of three nodes to the checkpoint of all':<60} {notice():>7.2f}")


if __name__ == "__main__":
    main()
