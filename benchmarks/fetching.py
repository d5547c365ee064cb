"""A snapshot from another node's RAM, beside the same bytes through a bare socket.

Ours: authenticated, hashed at both ends, checked that the slot was not written anew meanwhile. Bare: ``sendfile`` into a socket, and
what comes is written to a file: no secret, no digest. Both ends are on this machine and share its cores; both write over files whose
pages are there (``fresh``: to new ones). The ways take turns; medians and spread; CPU is of each end, in seconds for each GB.

    python benchmarks/fetching.py [--megabytes 512] [--rounds 7]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from supervisor.checkpoint.shelf import SlotShelf
from supervisor.checkpoint.slots import SlotRecord, write_slot
from supervisor.edge.peers.client import fetch, listing
from supervisor.edge.peers.protocol import Peer
from supervisor.edge.peers.server import PeerServer

HOST, SECRET, NAME = "127.0.0.1", os.urandom(32).hex(), "__0_0.distcp"


def serve(slot: Path, secret: str) -> None:
    """The other node: says its ports, then after each line its CPU seconds so far."""

    async def main() -> None:
        server = PeerServer(SlotShelf([slot]), bytes.fromhex(secret))
        bare = socket.create_server((HOST, 0))
        port = await server.open(HOST)
        loop = asyncio.get_running_loop()
        accepting = loop.run_in_executor(None, send_bare, bare, slot / NAME)
        print(port, bare.getsockname()[1], flush=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            print(time.process_time(), flush=True)
        bare.shutdown(socket.SHUT_RDWR)
        await asyncio.wait({accepting})
        await server.close()

    asyncio.run(main())


def send_bare(listener: socket.socket, path: Path) -> None:
    """To whoever connects."""
    while True:
        try:
            connection = listener.accept()[0]
        except OSError:
            return
        with connection, open(path, "rb") as file:
            connection.sendfile(file)


def receive_bare(port: int, path: Path) -> None:
    """Into ``path``, over what is there."""
    buffer = memoryview(bytearray(1 << 20))
    fd, at = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), 0
    with socket.create_connection((HOST, port)) as connection:
        while count := connection.recv_into(buffer):
            at += os.pwrite(fd, buffer[:count], at)
    os.close(fd)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(Path(args.serve[0]), args.serve[1])
        return
    folder = Path(tempfile.mkdtemp(prefix="everstep-fetching-", dir="/dev/shm"))
    try:
        compare(folder, args.megabytes << 20, args.rounds)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, size: int, rounds: int) -> None:
    """Both ends, in turns."""
    slot, target = folder / "slot", folder / "target"
    slot.mkdir()
    block = os.urandom(1 << 20)
    with open(slot / NAME, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    (slot / ".metadata").write_bytes(block)
    write_slot(slot, SlotRecord(step=1, attempt=0, world_size=1, created=time.time()))
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", slot, SECRET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as node:  # fmt: skip
        assert node.stdin is not None
        assert node.stdout is not None
        ports = [int(word) for word in node.stdout.readline().split()]
        peer = Peer(name="other", host=HOST, port=ports[0], secret=bytes.fromhex(SECRET))
        found = asyncio.run(listing(peer, 0, 1))

        def there() -> float:
            node.stdin.write("\n")  # type: ignore[union-attr]
            node.stdin.flush()  # type: ignore[union-attr]
            return float(node.stdout.readline())  # type: ignore[union-attr]

        def ours(warm: Path | None) -> None:
            asyncio.run(fetch(peer, found, NAME, target, patience=600, warm=warm))

        def fresh() -> None:
            target.unlink()
            ours(None)

        ways: dict[str, Callable[[], None]] = {
            "ours": lambda: ours(target),
            "bare": lambda: receive_bare(ports[1], target),
            "ours, fresh": fresh,
        }
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):  # the first is not measured
            for name, way in ways.items():
                before = time.perf_counter(), time.process_time(), there()
                way()
                after = time.perf_counter(), time.process_time(), there()
                if number:
                    taken[name].append((after[0] - before[0], after[1] - before[1], after[2] - before[2]))
        node.stdin.close()
    print(
        f"{size >> 20} MiB, {rounds} rounds, {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    )
    for name, rows in taken.items():
        seconds, here, other = ([row[column] for row in rows] for column in range(3))
        speeds = sorted(size / 1e9 / one for one in seconds)
        print(
            f"{name:<12} {statistics.median(speeds):5.2f} GB/s ({speeds[0]:.2f}-{speeds[-1]:.2f})"
            f"   CPU s/GB: receiver {statistics.median(here) * 1e9 / size:.2f}, sender {statistics.median(other) * 1e9 / size:.2f}"
        )


if __name__ == "__main__":
    main()
