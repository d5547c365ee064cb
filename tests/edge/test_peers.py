"""Snapshots between nodes: real sockets, real slots, and everything that can go wrong between two nodes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.checkpoint.manifest import METADATA_NAME, Key
from supervisor.checkpoint.shelf import SlotShelf
from supervisor.checkpoint.slots import SlotRecord, invalidate, read_slot, write_slot
from supervisor.edge.files import Pace
from supervisor.edge.peers import client, protocol, pump
from supervisor.edge.peers.client import fetch, listing
from supervisor.edge.peers.protocol import SERVICE, Listing, Peer
from supervisor.edge.peers.server import PeerServer
from supervisor.edge.store import wire
from supervisor.errors import PeerError, SnapshotGoneError, StorageError

SECRET = b"the secret"
HOST = "127.0.0.1"
DEADLINE = 30.0
SIZES = [0, 1, 63, 4096, pump.CHUNK - 1, pump.CHUNK, pump.CHUNK + 1, 3 * pump.CHUNK + 5]
LARGE = 24 << 20  # more than the kernel keeps for a connection


@pytest.fixture
def ram() -> Iterator[Path]:
    """A directory in tmpfs, where snapshots are."""
    path = Path(f"/dev/shm/everstep-peers-{os.getpid()}")
    subprocess.run(["rm", "-rf", path], check=True)
    path.mkdir()
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


def fill(
    folder: Path, sizes: dict[str, int], *, step: int = 5, seed: int = 0, key: Key | None = None
) -> SlotRecord:
    """A complete snapshot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in {METADATA_NAME: 10, **sizes}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(random.Random(f"{seed}{name}").randbytes(size))
    record = SlotRecord(step=step, attempt=1, world_size=1, created=1000.0 + seed, run_id="r")
    return write_slot(folder, record, key)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(DEADLINE):
            await test()

    asyncio.run(limited())


@contextlib.asynccontextmanager
async def serving(shelf: protocol.Shelf, said: list[str] | None = None) -> AsyncIterator[Peer]:
    server = PeerServer(shelf, SECRET, (said if said is not None else []).append)
    port = await server.open(HOST)
    try:
        yield Peer(name="b", host=HOST, port=port, secret=SECRET)
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def answering(talk: Callable[[wire.Wire], Awaitable[None]]) -> AsyncIterator[Peer]:
    """A node that knows the secret and then does as it likes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(wire.WireError), contextlib.closing(writer):
            await talk(await wire.accept(reader, writer, SECRET, SERVICE))

    server = await asyncio.start_server(serve, HOST, 0)
    yield Peer(name="b", host=HOST, port=server.sockets[0].getsockname()[1], secret=SECRET)
    server.close()


class Stepping(Pace):
    """Never makes anybody wait; calls ``then`` once so many bytes have come, and remembers the pieces."""

    def __init__(self, after: int, then: Callable[[], object], bandwidth: float = 1e12) -> None:
        super().__init__(bandwidth)
        self.after, self.then = after, then
        self.pieces: list[int] = []

    def spend(self, count: int) -> float:
        before = sum(self.pieces)
        self.pieces.append(count)
        if before < self.after <= before + count:
            self.then()
        return 0.0


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("key", [None, Key.derive("of the checkpoints")], ids=["no key", "key"])
def test_a_copy_is_the_snapshot_itself(ram: Path, key: Key | None) -> None:
    sizes = {f"__{rank}_0.distcp": size for rank, size in enumerate(SIZES)} | {"a/b.distcp": 77}
    record = fill(ram / "slot", sizes, key=key)

    async def test() -> None:
        async with serving(SlotShelf([ram / "empty", ram / "slot"], key)) as peer:
            found = await listing(peer, 1, 5)
            assert found.files == record.files
            assert found.stamp == (await listing(peer, 1, 5)).stamp
            await asyncio.gather(
                *(fetch(peer, found, name, ram / "copy" / name, patience=DEADLINE) for name in found.files)
            )
            (ram / "copy" / SLOT_NAME).write_text(found.record)
            assert read_slot(ram / "copy", key) == record
            assert left(ram / "copy") == left(ram / "slot")
            for name in record.files:
                assert (ram / "copy" / name).read_bytes() == (ram / "slot" / name).read_bytes(), name

    run(test)


@pytest.mark.parametrize("before", [0, 100, LARGE])
def test_the_pages_of_a_file_of_no_more_use_are_written_over(ram: Path, before: int) -> None:
    size = pump.CHUNK + 17
    fill(ram / "slot", {"x.distcp": size})
    old, target = ram / "old", ram / "copy"
    old.write_bytes(b"o" * before)
    inode = old.stat().st_ino
    shared = ram / "shared"
    shared.write_bytes(b"s" * 9)
    os.link(shared, ram / "checkpoint")

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:
            found = await listing(peer, 1, 5)
            await fetch(peer, found, "x.distcp", target, patience=DEADLINE, warm=old)
            assert target.stat().st_ino == inode
            assert target.read_bytes() == (ram / "slot/x.distcp").read_bytes()
            assert not old.exists()
            await fetch(peer, found, "x.distcp", target, patience=DEADLINE, warm=shared)
            assert (ram / "checkpoint").read_bytes() == b"s" * 9, "somebody else's file, too"
            await fetch(peer, found, "x.distcp", target, patience=DEADLINE, warm=ram / "was never there")
            assert target.read_bytes() == (ram / "slot/x.distcp").read_bytes()

    run(test)


def test_what_is_not_there_is_said(ram: Path) -> None:
    fill(ram / "slot", {"x.distcp": 10})
    unfinished = ram / "unfinished"
    fill(unfinished, {"x.distcp": 10}, step=7)
    invalidate(unfinished)
    damaged = ram / "damaged"
    fill(damaged, {"x.distcp": 10}, step=8)
    (damaged / "x.distcp").write_bytes(b"short")

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot", unfinished, damaged, ram / "no such slot"])) as peer:
            for attempt, step in ((1, 6), (2, 5), (1, 7), (1, 8)):
                with pytest.raises(SnapshotGoneError, match=rf"node b \({HOST}:.*no snapshot of step {step}"):
                    await listing(peer, attempt, step)
            found = await listing(peer, 1, 5)
            older = replace(found, record=found.record + " ")
            with pytest.raises(SnapshotGoneError, match="taken its place"):
                await fetch(peer, older, "x.distcp", ram / "copy", patience=DEADLINE)
            assert not (ram / "copy").exists()

    run(test)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "link", "slot.json", "missing"]
)
def test_only_files_of_the_snapshot_are_served(ram: Path, name: str) -> None:
    (ram / "secret").write_bytes(b"x" * 10)
    fill(ram / "slot", {"x.distcp": 10})
    (ram / "slot" / "link").symlink_to(ram / "secret")

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:
            found = await listing(peer, 1, 5)
            wanted = replace(found, files={**found.files, name: 10})
            with pytest.raises(PeerError, match="has no file"):
                await fetch(peer, wanted, name, ram / "copy", patience=DEADLINE)
            assert not (ram / "copy").exists()

    run(test)


@pytest.mark.parametrize("name", ["x.distcp", "a/x.distcp"])
def test_what_has_become_a_link_is_not_followed(ram: Path, name: str) -> None:
    """By whoever may write to the slot, and may not read what the supervisor may."""
    fill(ram / "slot", {name: 10})
    fill(ram / "secret", {"x.distcp": 10})

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:
            found = await listing(peer, 1, 5)
            entry = ram / "slot" / name.split("/", maxsplit=1)[0]
            entry.rename(ram / "away")
            entry.symlink_to(ram / "secret" / ("x.distcp" if entry.suffix else ""))
            with pytest.raises(PeerError, match="broke off after 0 of 10"):
                await fetch(peer, found, name, ram / "copy", patience=DEADLINE)
            assert not (ram / "copy").exists()

    run(test)


def test_slots_change_places(ram: Path) -> None:
    """The leader's and this node's slots of a step are made to bear the same number."""
    folders = [ram / "0", ram / "1"]
    for step, folder in enumerate(folders):
        fill(folder, {"x.distcp": LARGE}, step=step)
    content = (folders[0] / "x.distcp").read_bytes()

    def swap() -> None:
        folders[0].rename(ram / "moving")
        folders[1].rename(folders[0])
        (ram / "moving").rename(folders[1])

    async def test() -> None:
        async with serving(SlotShelf(folders)) as peer:
            found = await listing(peer, 1, 0)
            for pace in (Stepping(1, swap), Stepping(LARGE + 1, swap)):
                await fetch(peer, found, "x.distcp", ram / "copy", patience=DEADLINE, pace=pace)
                assert (ram / "copy").read_bytes() == content

    run(test)


@pytest.mark.parametrize(
    "files", [{"../x": 1}, {"/x": 1}, {"a\nb": 1}, {"x": -1}, {"x": "many"}, {"x": None}, [], "x", None]
)
def test_a_listing_that_makes_no_sense_is_refused(files: object) -> None:
    async def talk(connection: wire.Wire) -> None:
        await connection.receive()
        connection.send({"record": "{}", "files": files})

    async def test() -> None:
        async with answering(talk) as peer:
            with pytest.raises(PeerError, match="node b"):
                await listing(peer, 1, 5)

    run(test)


def test_a_stranger_reads_nothing_and_an_impostor_is_not_asked(ram: Path) -> None:
    fill(ram / "slot", {"x.distcp": 10})

    async def test() -> None:
        said: list[str] = []
        async with serving(SlotShelf([ram / "slot"]), said) as peer:
            found = await listing(peer, 1, 5)
            for stranger in (replace(peer, secret=b"another"), replace(peer, secret=b"")):
                with pytest.raises(PeerError, match="EVERSTEP_KEY"):
                    await listing(stranger, 1, 5)
                with pytest.raises(PeerError, match="EVERSTEP_KEY"):
                    await fetch(stranger, found, "x.distcp", ram / "copy", patience=DEADLINE)
            # who serves the store with the same secret is no peer, and no store is one
            reader, writer = await asyncio.open_connection(HOST, peer.port)
            with pytest.raises(wire.WireError):
                await wire.greet(reader, writer, SECRET)
            writer.close()
            for words in (b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(64), b"\xff" * 200_000):
                reader, writer = await asyncio.open_connection(HOST, peer.port)
                writer.write(words)
                writer.write_eof()
                heard = b""
                with contextlib.suppress(ConnectionError):
                    heard = await reader.read()
                assert len(heard) <= len(wire.MAGIC) + wire.NONCE
                writer.close()
            assert len(said) == 1
            assert HOST in said[0]
            assert (await listing(peer, 1, 5)) == found

    run(test)


@pytest.mark.parametrize(
    "message",
    [{}, {"op": "listing"}, {"op": "stop", "attempt": 1, "step": 5}, {"op": "file", "attempt": 1, "step": 5},
     {"op": "listing", "attempt": "x", "step": []}, {"op": "listing", "attempt": 1e400, "step": 5}],
)  # fmt: skip
def test_a_wrong_request_is_refused(ram: Path, message: wire.Message) -> None:
    fill(ram / "slot", {"x.distcp": 10})

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:
            reader, writer = await asyncio.open_connection(HOST, peer.port)
            connection = await wire.greet(reader, writer, SECRET, SERVICE)
            connection.send(message)
            assert set(await connection.receive()) == {"refused"}
            connection.close()

    run(test)


def overwritten(slot: Path) -> Callable[[], object]:
    """What a save does to the slot that it is given, in the middle of it."""

    def write() -> None:
        invalidate(slot)
        for path in slot.iterdir():
            with path.open("r+b") as file:
                file.write(b"n" * path.stat().st_size)

    return write


@pytest.mark.parametrize("anew", [False, True], ids=["being written", "complete again"])
def test_a_slot_that_is_written_anew_meanwhile_is_noticed(ram: Path, anew: bool) -> None:
    fill(ram / "slot", {"x.distcp": LARGE})

    def then() -> None:
        overwritten(ram / "slot")()
        if anew:
            fill(ram / "slot", {"x.distcp": LARGE}, seed=1)

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:
            found = await listing(peer, 1, 5)
            with pytest.raises(SnapshotGoneError):
                await fetch(
                    peer, found, "x.distcp", ram / "copy/x", patience=DEADLINE, pace=Stepping(1, then)
                )
            assert left(ram / "copy") == []

    run(test)


def test_a_long_transfer_is_broken_off_once_its_snapshot_has_gone(
    ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "LOOK", 1)
    fill(ram / "slot", {"x.distcp": LARGE})
    pace = Stepping(1, overwritten(ram / "slot"))

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:
            found = await listing(peer, 1, 5)
            with pytest.raises(SnapshotGoneError):
                await fetch(peer, found, "x.distcp", ram / "copy/x", patience=DEADLINE, pace=pace)
            assert left(ram / "copy") == []
            assert 0 < sum(pace.pieces) < LARGE

    run(test)


SERVER = """
import asyncio, sys
from pathlib import Path
from supervisor.checkpoint.shelf import SlotShelf
from supervisor.edge.peers.server import PeerServer

async def main():
    server = PeerServer(SlotShelf([Path(sys.argv[1])]), b"the secret")
    print(await server.open("127.0.0.1"), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_that_dies_or_hangs_among_the_bytes(
    ram: Path, monkeypatch: pytest.MonkeyPatch, blow: signal.Signals
) -> None:
    fill(ram / "slot", {"x.distcp": LARGE})

    def strike() -> None:
        monkeypatch.setattr(client, "ANSWER", 0.3)
        node.send_signal(blow)

    with subprocess.Popen(
        [sys.executable, "-c", SERVER, ram / "slot"], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as node:
        try:
            assert node.stdout is not None
            peer = Peer(name="b", host=HOST, port=int(node.stdout.readline()), secret=SECRET)

            async def test() -> None:
                found = await listing(peer, 1, 5, patience=DEADLINE)
                pace, expected = Stepping(1, strike), "it broke off after"
                if blow == signal.SIGSTOP:
                    expected = "nothing came for"
                    monkeypatch.setattr(pump, "STALL", 0.3)
                with pytest.raises(PeerError, match=f"node b .*x.distcp of step 5: {expected}") as raised:
                    await fetch(peer, found, "x.distcp", ram / "copy/x", patience=DEADLINE, pace=pace)
                assert not isinstance(raised.value, SnapshotGoneError)
                assert left(ram / "copy") == []
                assert sum(pace.pieces) < LARGE

            run(test)
        finally:
            node.kill()


def test_a_node_that_says_nothing_costs_no_more_than_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(connection: wire.Wire) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        async with answering(talk) as peer:
            with pytest.raises(PeerError, match="not answered in time"):
                await listing(peer, 1, 5, patience=0.05)
            monkeypatch.setattr(client, "ANSWER", 0.05)
            with pytest.raises(PeerError, match="not answered in time"):
                await listing(peer, 1, 5, patience=DEADLINE)
        with pytest.raises(PeerError, match="Connection refused"):
            await listing(peer, 1, 5)

    run(test)


def test_bytes_that_were_changed_on_the_way_are_noticed(ram: Path) -> None:
    """By who sits in between: it can change what is outside the frames, and not the digest."""
    fill(ram / "slot", {"x.distcp": pump.CHUNK})
    content = (ram / "slot/x.distcp").read_bytes()

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:

            async def tap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                inner, outer = await asyncio.open_connection(HOST, peer.port)

                async def forward() -> None:
                    while data := await reader.read(1 << 16):
                        outer.write(data)

                async def back() -> None:
                    seen = bytearray()
                    while data := await inner.read(1 << 16):
                        seen += data
                        at = seen.find(content[:64])
                        if at >= 0 and at + 70_000 < len(seen) <= at + 70_000 + len(data):
                            data = data[:-1] + bytes([data[-1] ^ 1])
                        writer.write(data)

                with contextlib.closing(writer), contextlib.closing(outer):
                    await asyncio.gather(forward(), back(), return_exceptions=True)

            relay = await asyncio.start_server(tap, HOST, 0)
            found = await listing(peer, 1, 5)
            between = replace(peer, port=relay.sockets[0].getsockname()[1])
            with pytest.raises(PeerError, match="not what was sent"):
                await fetch(between, found, "x.distcp", ram / "copy/x", patience=DEADLINE)
            assert left(ram / "copy") == []
            relay.close()

    run(test)


def test_a_limit_holds_for_all_fetches_together(ram: Path) -> None:
    """The pace says when the next piece may come; here that is never, once a tenth of a second's bytes are there."""
    fill(ram / "slot", {f"{n}.distcp": LARGE for n in range(2)})
    spent: list[int] = []
    both = asyncio.Event()

    class Halting(Pace):
        def spend(self, count: int) -> float:
            spent.append(count)
            if len(spent) == 2:
                loop.call_soon_threadsafe(both.set)
            return 3600.0

    async def test() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        async with serving(SlotShelf([ram / "slot"])) as peer:
            found = await listing(peer, 1, 5)
            pace = Halting(1e6)
            fetches = [
                asyncio.ensure_future(
                    fetch(peer, found, f"{n}.distcp", ram / f"copy/{n}", patience=DEADLINE, pace=pace)
                )
                for n in range(2)
            ]
            await both.wait()
            assert sum(spent) <= 2 * pace.piece == 200_000
            fetches[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetches[0]
            assert len(left(ram / "copy")) == 1, "the other's"
            fetches[1].cancel()
            await asyncio.wait(fetches)
            assert left(ram / "copy") == []
            assert len(spent) == 2

    loop: asyncio.AbstractEventLoop
    run(test)


def test_the_patience_of_a_fetch_ends(ram: Path) -> None:
    fill(ram / "slot", {"x.distcp": LARGE})

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:
            found = await listing(peer, 1, 5)
            with pytest.raises(PeerError, match="in time"):
                await fetch(peer, found, "x.distcp", ram / "copy/x", patience=0.2, pace=Pace(1000.0))
            assert left(ram / "copy") == []

    run(test)


def test_a_server_that_closes_ends_what_it_is_sending(ram: Path) -> None:
    fill(ram / "slot", {"x.distcp": LARGE})

    async def test() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        server = PeerServer(SlotShelf([ram / "slot"]), SECRET)
        peer = Peer(name="b", host=HOST, port=await server.open(HOST), secret=SECRET)
        found = await listing(peer, 1, 5)

        class Holding(Pace):
            def spend(self, count: int) -> float:
                loop.call_soon_threadsafe(begun.set)
                closed.wait(DEADLINE)
                return 0.0

        closed = threading.Event()
        fetching = asyncio.ensure_future(
            fetch(peer, found, "x.distcp", ram / "copy/x", patience=DEADLINE, pace=Holding(1e12))
        )
        await begun.wait()
        await server.close()
        closed.set()
        with pytest.raises(PeerError, match="broke off"):
            await fetching
        assert left(ram / "copy") == []

    run(test)


def test_where_it_cannot_be_written_that_is_this_nodes_own_fault(ram: Path) -> None:
    fill(ram / "slot", {"x.distcp": 10})
    (ram / "file").write_bytes(b"")

    async def test() -> None:
        async with serving(SlotShelf([ram / "slot"])) as peer:
            found: Listing = await listing(peer, 1, 5)
            with pytest.raises(StorageError, match="file"):
                await fetch(peer, found, "x.distcp", ram / "file" / "x", patience=DEADLINE)

    run(test)


def test_a_port_that_is_taken_is_said(ram: Path) -> None:
    async def test() -> None:
        async with serving(SlotShelf([])) as peer:
            with pytest.raises(PeerError, match=f"{HOST}:{peer.port}"):
                await PeerServer(SlotShelf([]), SECRET).open(HOST, peer.port)

    run(test)


def test_only_a_host_that_is_silent_is_not_reached(ram: Path) -> None:
    async def test() -> None:
        said: list[str] = []
        async with serving(SlotShelf([ram / "0"], None), said) as peer:
            assert await client.is_reached(peer, DEADLINE)
        assert await client.is_reached(peer, DEADLINE), "it refuses: so there is a way to it"
        assert said == []
        with (
            socket.create_server((HOST, 0), backlog=0) as full,
            socket.socket() as first,
            socket.socket() as second,
        ):
            for one in (first, second):  # the kernel drops what more is sent to it
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            assert not await client.is_reached(replace(peer, port=full.getsockname()[1]), 0.2)

    run(test)
