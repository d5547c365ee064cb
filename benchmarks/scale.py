"""How agreement among node supervisors grows with their number: the real store and leader, the real protocol, no training.

    python benchmarks/scale.py [--nodes 64 512 4096] [--rounds 20] [--lease 5] [--profile FILE]

One process serves the store over TCP and leads: what every report says goes through ``supervisor/lead.py``, and its orders to all nodes. The nodes
are connections of other processes (``crowd.py``), which do what node supervisors do: each has a lease of its own, reports its steps, confirms
proposals, makes slots ready, tells of its saves. A round is one agreed save: from the leader's wish until the last node has the verdict. All
of it shares this machine; what the leader itself costs is its own CPU time, and where a round takes longer than that the nodes are why, or the other
users of the machine. Peer copies and checkpoints are not made. In between, nothing happens but steps and leases for some seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import crowd
from supervisor.attempt import Attempt
from supervisor.config import Options
from supervisor.decide.membership import Size
from supervisor.edge.console import Console
from supervisor.edge.journal import Journal
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.server import Server
from supervisor.fleet import Assignment, Member, Report
from supervisor.joining import Joining, new_life, until
from supervisor.lead import Lead
from supervisor.ledger import Ledger
from supervisor.model import ProposalFlag
from supervisor.replay import Replay
from supervisor.shared_snapshots import SharedSnapshots

SECRET = b"of the benchmark"
QUIET = 10.0  # seconds in which nothing happens
DEADLINE = 300.0


class Crowds:
    """The nodes, in their processes."""

    def __init__(self, nodes: int, processes: int, port: int, lease: float) -> None:
        self.pipes: list[Connection] = []
        self._processes = []
        self._verdicts: dict[int, list[float]] = {}
        self._counts: list[tuple[int, int, float]] = []
        self._news = asyncio.Event()
        for number in range(processes):
            first, end = nodes * number // processes, nodes * (number + 1) // processes
            ours, theirs = multiprocessing.Pipe()
            arguments = (first, end - first, nodes, port, SECRET, lease, theirs)
            process = multiprocessing.Process(target=crowd.run, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self.pipes.append(ours)
            asyncio.get_running_loop().add_reader(ours.fileno(), self._hear, ours)

    def close(self) -> None:
        """End them."""
        for pipe in self.pipes:
            asyncio.get_running_loop().remove_reader(pipe.fileno())
        for process in self._processes:
            process.kill()
            process.join()

    async def verdict(self, serial: int) -> float:
        """When the last node had it."""
        while len(found := self._verdicts.get(serial, [])) < len(self.pipes):
            await self._wait()
        return max(found)

    async def counts(self) -> tuple[int, float]:
        """Frames sent to them and by them, and their CPU seconds."""
        self._counts.clear()
        for pipe in self.pipes:
            pipe.send("counts")
        while len(self._counts) < len(self.pipes):
            await self._wait()
        return sum(sent + received for sent, received, _ in self._counts), sum(
            cpu for _, _, cpu in self._counts
        )

    async def _wait(self) -> None:
        self._news.clear()
        await asyncio.wait_for(self._news.wait(), DEADLINE)

    def _hear(self, pipe: Connection) -> None:
        try:
            kind, *rest = pipe.recv()
        except EOFError:
            raise SystemExit("a process of nodes has ended") from None
        if kind == "verdict":
            serial, when = rest
            self._verdicts.setdefault(serial, []).append(when)
        else:
            self._counts.append(tuple(rest))
        self._news.set()


async def measure(nodes: int, options: argparse.Namespace) -> None:
    """One line of the table."""
    with tempfile.TemporaryDirectory(prefix="everstep-scale-") as folder:
        async with MemoryStore() as store:
            server = Server(store, SECRET)
            port = await server.open(crowd.HOST, 0)
            own = Report(
                name="leader", life=new_life(), host="leader", pid=os.getpid(), address=crowd.HOST, port=1
            )
            joining = Joining(store, own, options.lease)
            joining.start()
            assert await until(joining, lambda: joining.has_joined)
            assert await joining.campaign()
            crowds = Crowds(nodes, options.processes, port, options.lease)
            try:
                with _leading(joining, store, Path(folder), options.lease) as lead:
                    await rounds(lead, crowds, Path(folder), nodes, options)
                    await lead.close()
            finally:
                crowds.close()
                await joining.close()
                await server.close()


@contextlib.contextmanager
def _leading(joining: Joining, store: MemoryStore, folder: Path, lease: float) -> Iterator[Lead]:
    options = Options(lease=lease, peer_copies="off", standby="off")
    console, folded = Console(quiet=True), Replay(folder / "journal")
    folded.advance()
    ledger = Ledger(Journal(folder / "journal" / "leader.jsonl"), folded)
    snapshots = SharedSnapshots(folder, run_id="run", key=None, fact=lambda _fact: None)
    try:
        yield Lead(
            joining, store, options, ledger, console, snapshots, size=Size(least=1, most=1 << 20), epoch=1, run_id="run"
        )  # fmt: skip
    finally:
        ledger.close()
        console.close()


async def rounds(lead: Lead, crowds: Crowds, folder: Path, nodes: int, options: argparse.Namespace) -> None:
    """Begin an attempt on all nodes, agree again and again, and print what that took."""
    lead.start(lambda: None)
    reports = lead.roster.reports
    began = time.monotonic()
    while len(reports) <= nodes:
        await asyncio.sleep(0.05)
    joined = time.monotonic() - began
    members = tuple(
        Member(name=name, life=reports[name].life) for name in sorted(reports) if name != "leader"
    )
    attempt = Attempt(0, folder / "attempt", folder, "run", nodes=nodes)
    assignment = Assignment(
        attempt=0, members=members, address=crowd.HOST, port=1, peers=lead.roster.peers(members)
    )
    saved = asyncio.Event()
    lead.rounds.on_saved = lambda _step, _flags: saved.set()
    began = time.monotonic()
    lead.roster.assignment = assignment
    lead.begin(attempt, assignment)
    while (slot := lead.order.slot) is None or not slot.offered:
        await asyncio.sleep(0.01)
    begun = time.monotonic() - began
    latencies, costs, frames, aborted = [], [], [], 0
    profile = cProfile.Profile()
    for number in range(options.rounds):
        serial = lead.order.proposal.serial
        before, _ = await crowds.counts()
        used, started = _used(), time.monotonic()
        if options.profile and number:
            profile.enable()
        saved.clear()
        lead.want(ProposalFlag.CHECKPOINT)
        await saved.wait()
        profile.disable()
        aborted += lead.order.proposal.serial - serial - 1
        latencies.append(await crowds.verdict(lead.order.proposal.serial) - started)
        costs.append(_used() - used)
        await asyncio.sleep(0.5)
        frames.append(((await crowds.counts())[0] - before) / nodes)
    (before, cpu_before), used, began = await crowds.counts(), _used(), time.monotonic()
    await asyncio.sleep(QUIET)
    (after, cpu_after), seconds = await crowds.counts(), time.monotonic() - began
    quiet, theirs, idle = (
        (_used() - used) / seconds,
        (cpu_after - cpu_before) / seconds,
        (after - before) / seconds / nodes,
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.verbose:
        print(
            " ".join(f"{one:.2f}/{cost:.2f}" for one, cost in zip(latencies, costs, strict=True)),
            file=sys.stderr,
        )
    latencies.sort()
    print(
        f"{nodes:>6} {joined:>7.1f} {begun:>7.2f} {statistics.median(latencies):>8.3f} {_percentile(latencies):>8.3f} "
        f"{statistics.median(costs):>8.3f} {statistics.median(frames):>8.1f} {aborted:>8} {quiet:>8.3f} {theirs:>8.3f} "
        f"{idle:>8.2f} {quiet / nodes * 1e6:>8.0f} {memory:>6.0f}",
        flush=True,
    )
    if options.profile:
        profile.dump_stats(f"{options.profile}.{nodes}")


def _percentile(ordered: list[float]) -> float:
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _used() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _raise_file_limit() -> None:
    """Thousands of connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--lease", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=1, help="that the nodes are spread over")
    parser.add_argument(
        "--profile", help="write what the leader does in its rounds to FILE.<nodes>, for pstats"
    )
    parser.add_argument("--verbose", action="store_true", help="every round's seconds")
    options = parser.parse_args()
    _raise_file_limit()
    print(f"{os.cpu_count()} cores for the leader and all nodes; load before: {os.getloadavg()[0]:.1f}")
    print(
        "         to join, begin | a round: s          leader's  frames            | quiet: cores    frames  leader's |"
    )
    print(
        f"{'nodes':>6} {'s':>7} {'s':>7} {'p50':>8} {'p99':>8} {'CPU s':>8} {'a node':>8} {'aborted':>8} {'leader':>8} {'nodes':>8} "
        f"{'node/s':>8} {'us/node/s':>8} {'MB':>6}"
    )
    for nodes in options.nodes:
        asyncio.run(measure(nodes, options))


if __name__ == "__main__":
    main()
