"""How agreement among node supervisors grows with their number: the real store, the real protocol, no training.

    python benchmarks/scale.py [--nodes 64 512 4096] [--rounds 20]

One process serves the store over TCP and leads: it reads all reports, decides (``decide/agreement.py``) and orders. The nodes are
``Joining`` objects, each with its own authenticated connection, lease and report, some hundreds to a process. A round is one agreed
save: from the leader's wish until the last node has the verdict. So all of it, the nodes too, shares this machine; what the leader
itself costs is its CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

from supervisor.decide import agreement as agreements
from supervisor.decide.agreement import Agreement, Duty, Posted, Standing, duty
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.server import Server
from supervisor.edge.store.tcp import TcpStore
from supervisor.fleet import Answer, Course, Order, Report
from supervisor.joining import Joining, Roll, new_life, until
from supervisor.model import ProposalFlag, ProposalState

SECRET = b"of the benchmark"
HOST = "127.0.0.1"
LEASE = 10.0  # seconds: twice the default, for processes that share two cores with thousands of others
A_PROCESS = 512  # nodes


# --------------------------------------------------------------------------- the nodes


async def one_node(name: str, port: int, seen: list[float]) -> None:
    """Joins, answers every proposal, and notes when it has got each verdict."""
    client = TcpStore(HOST, port, SECRET, answer=120.0)
    report = Report(name=name, life=new_life(), host=name, pid=os.getpid(), address=HOST, port=1)
    node = Joining(client, replace(report, course=Course(attempt=0, world_size=8, in_session=True)), LEASE)
    node.start()
    posted = Posted()
    while True:
        before = node.revision
        await until(node, lambda before=before: node.revision != before)  # type: ignore[misc]
        if node.order is None:
            continue
        proposal = node.order.proposal
        match duty(posted, proposal, 0):
            case Duty.ANSWER:
                posted = Posted(serial=proposal.serial, state=ProposalState.PROPOSED)
                node.tell(replace(node.report, answer=Answer(serial=proposal.serial, confirmed=True)))
            case Duty.COMMIT:
                posted = Posted(serial=proposal.serial, state=proposal.state)
                seen.append(time.monotonic())
            case _:
                pass


def nodes_process(first: int, count: int, port: int, pipe: Connection) -> None:
    """``count`` nodes; sends how many verdicts were seen, and when the last was, whenever all have."""
    raise_file_limit()

    async def main() -> None:
        seen: list[float] = []
        tasks = []
        for number in range(first, first + count):
            tasks.append(asyncio.create_task(one_node(f"n{number:05d}", port, seen)))
            if number % 16 == 0:
                await asyncio.sleep(0.01)
        told = 0
        while True:
            await asyncio.sleep(0.001)
            if len(seen) >= told + count:
                told += count
                pipe.send(max(seen[told - count : told]))

    asyncio.run(main())


# --------------------------------------------------------------------------- the leader


async def measure(nodes: int, rounds: int) -> None:
    """One line of the table."""
    async with MemoryStore() as store:
        server = Server(store, SECRET)
        port = await server.open(HOST, 0)
        pipes: list[Connection] = []
        processes = []
        for first in range(0, nodes, A_PROCESS):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            count = min(A_PROCESS, nodes - first)
            process = multiprocessing.Process(
                target=nodes_process, args=(first, count, port, theirs), daemon=True
            )
            process.start()
            processes.append(process)
            pipes.append(ours)
        try:
            roll = Roll(store)
            while len(roll.reports) < nodes:
                await roll.look(5.0)
            await lead(store, roll, pipes, nodes, rounds)
        finally:
            for process in processes:
                process.kill()
                process.join()
            await server.close()


async def lead(store: MemoryStore, roll: Roll, pipes: Sequence[Connection], nodes: int, rounds: int) -> None:
    """Agree ``rounds`` times, and print what that took."""
    quiet = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    await asyncio.sleep(5.0)
    idle = cpu(quiet) / (time.monotonic() - began)
    order = Order(serial=0, leader="leader", epoch=1, run_id="run")
    state = Agreement(attempt=0)
    latencies, costs, aborted = [], [], 0
    changes = store.table.revision
    for number in range(rounds):
        used, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        state = agreements.want(state, ProposalFlag.CHECKPOINT)
        step = 1000 * (number + 1)
        while True:
            stands = [
                Standing(in_session=True, first=step, last=step, answer=report.answer)
                for report in roll.reports.values()
            ]
            new = agreements.look(state, stands, 1.0, time.monotonic())
            if new.proposal != state.proposal:
                aborted += new.proposal.state is ProposalState.ABORTED
                order = replace(order, serial=order.serial + 1, proposal=new.proposal)
                await store.put("job/order", encoded(order))
            state = new
            if state.proposal.state is ProposalState.COMMITTED and state.wanted is None:
                break
            await roll.look(1.0)
        last = max([await asyncio.to_thread(pipe.recv) for pipe in pipes])
        latencies.append(last - started)
        costs.append(cpu(used))
        state, _ = agreements.served(state, state.proposal.step)
    per_round = (store.table.revision - changes) / rounds
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ordered = sorted(latencies)
    print(
        f"{nodes:>6} {statistics.median(ordered):>9.3f} {ordered[int(0.99 * (len(ordered) - 1))]:>9.3f} "
        f"{ordered[-1]:>9.3f} {statistics.median(costs):>12.3f} {idle:>12.3f} {per_round:>9.0f} {aborted:>8} {memory:>9.0f}"
    )


def encoded(order: Order) -> str:
    """As ``Joining`` writes it."""
    import json

    from supervisor.edge import plain

    return json.dumps(plain.to_plain(order), separators=(",", ":"))


def cpu(since: resource.struct_rusage) -> float:
    """Seconds of CPU of this process since then."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_utime + now.ru_stime - since.ru_utime - since.ru_stime


def raise_file_limit() -> None:
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
    options = parser.parse_args()
    raise_file_limit()
    print(f"{os.cpu_count()} cores for the leader and all nodes; load before: {os.getloadavg()[0]:.1f}")
    print(
        f"{'nodes':>6} {'p50 s':>9} {'p99 s':>9} {'longest':>9} {'CPU s/round':>12} {'idle cores':>12} {'changes':>9} "
        f"{'aborted':>8} {'MB':>9}"
    )
    for nodes in options.nodes:
        asyncio.run(measure(nodes, options.rounds))


if __name__ == "__main__":
    main()
