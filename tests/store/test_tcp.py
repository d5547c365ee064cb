"""The tcp store against who should not be heard, and against its own restarts. Sockets are real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
from collections.abc import AsyncIterator

import pytest

from supervisor.edge.store import door, wire
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.server import Server
from supervisor.edge.store.table import Table
from supervisor.edge.store.tcp import TcpStore
from supervisor.errors import StoreError

SECRET = b"the secret"
DEADLINE = 30.0
HOST = "127.0.0.1"


@contextlib.asynccontextmanager
async def serving(
    table: Table | None = None, port: int = 0
) -> AsyncIterator[tuple[MemoryStore, int, list[str]]]:
    said: list[str] = []
    async with asyncio.timeout(DEADLINE), MemoryStore(table) as store:
        await store.put("job/order", "run")
        server = Server(store, SECRET, said.append)
        port = await server.open(HOST, port)
        try:
            yield store, port, said
        finally:
            await server.close()


async def untouched(store: MemoryStore, port: int) -> None:
    """The table is as it was, and who knows the secret is served."""
    assert {key: entry.value for key, entry in (await store.read("job/")).entries.items()} == {
        "job/order": "run"
    }
    member = TcpStore(HOST, port, SECRET)
    assert (await member.read("job/")).entries["job/order"].value == "run"
    await member.close()


async def until_refused(member: TcpStore) -> None:
    while True:
        await member.read("job/")


def frame(content: bytes, proof: bytes = bytes(32)) -> bytes:
    return struct.pack(">I", len(content)) + content + proof


STOP = json.dumps(
    {"op": "put", "id": 1, "key": "job/order", "value": "stop", "expected": None, "lease": None}
).encode()


def test_another_secret_neither_joins_nor_reads_nor_writes() -> None:
    async def main() -> None:
        async with serving() as (store, port, said):
            stranger = TcpStore(HOST, port, b"another secret")
            for call in (stranger.read("job/"), stranger.put("job/order", "stop"), stranger.grant(5)):
                with pytest.raises(StoreError, match="EVERSTEP_KEY"):
                    await call
            await untouched(store, port)
            assert len(said) == 1
            assert HOST in said[0]

    asyncio.run(main())


def test_a_server_that_does_not_know_the_secret_is_refused() -> None:
    """It may want to give orders, or to be told what only members are."""

    async def main() -> None:
        async with asyncio.timeout(DEADLINE), MemoryStore() as store:
            impostor = Server(store, b"another secret")

            async def careless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(wire.MAGIC + os.urandom(32))
                await reader.readexactly(64)
                writer.write(os.urandom(32) + frame(b'{"id":1,"ok":{}}'))

            other = await asyncio.start_server(careless, HOST, 0)
            ports = [await impostor.open(HOST, 0), other.sockets[0].getsockname()[1]]
            for port in ports:
                member = TcpStore(HOST, port, SECRET)
                with pytest.raises(StoreError, match="EVERSTEP_KEY"):
                    await member.read("job/")
            other.close()
            await impostor.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "bytes_",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(64),
        bytes(64) + frame(STOP),
        b"\xff" * 4096,
        struct.pack(">I", 0xFFFFFFFF) + b"x" * 100,
        bytes(63),
    ],
)
def test_raw_bytes_of_a_stranger_change_nothing(bytes_: bytes) -> None:
    async def main() -> None:
        async with serving() as (store, port, _said):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(bytes_)
            writer.write_eof()
            answer = await reader.read()
            assert len(answer) <= len(wire.MAGIC) + wire.NONCE, "a stranger was told something"
            writer.close()
            await untouched(store, port)

    asyncio.run(main())


def test_what_was_overheard_cannot_be_said_again() -> None:
    """A tap between a member and the store; then its words again, in the same connection and in another one."""

    async def main() -> None:
        async with serving() as (store, port, _said):
            heard: list[bytes] = []
            taps: list[asyncio.StreamWriter] = []

            async def tap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                inner, outer = await asyncio.open_connection(HOST, port)
                taps.append(outer)

                async def forward() -> None:
                    while data := await reader.read(65536):
                        heard.append(data)
                        outer.write(data)

                async def back() -> None:
                    while data := await inner.read(65536):
                        writer.write(data)
                    writer.close()

                with contextlib.closing(writer), contextlib.closing(outer):
                    await asyncio.gather(forward(), back(), return_exceptions=True)

            relay = await asyncio.start_server(tap, HOST, 0)
            member = TcpStore(HOST, relay.sockets[0].getsockname()[1], SECRET, answer=1.0)
            await member.put("job/order", "run")
            await member.put("job/order", "stop")
            await store.put("job/order", "run")
            spoken = b"".join(heard)
            handshake, words = spoken[:64], spoken[64:]
            taps[0].write(words)  # in the same connection: its frames were numbered
            with pytest.raises(StoreError):
                await until_refused(member)
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(handshake + words)  # in another: it answers to another nonce
            await reader.read()
            writer.close()
            await untouched(store, port)
            await member.close()
            relay.close()

    asyncio.run(main())


def test_what_the_server_says_cannot_be_sent_back_to_it() -> None:
    async def main() -> None:
        async with serving() as (store, port, _said):
            reader, writer = await asyncio.open_connection(HOST, port)
            nonce = (await reader.readexactly(40))[8:]
            other_reader, other_writer = await asyncio.open_connection(HOST, port)
            await other_reader.readexactly(40)
            other_writer.write(nonce + bytes(32))  # the server's own nonce, for ours
            assert await other_reader.read() == b""
            writer.write(nonce + bytes(32))
            assert await reader.read() == b""
            await untouched(store, port)

    asyncio.run(main())


def test_a_member_that_sends_a_huge_frame_or_half_a_one_harms_nobody() -> None:
    async def main() -> None:
        async with serving() as (store, port, _said):
            for words in (struct.pack(">I", wire.LIMIT + 1) + b"x", struct.pack(">I", 100) + b"half"):
                reader, writer = await asyncio.open_connection(HOST, port)
                await wire.greet(reader, writer, SECRET)
                writer.write(words)
                writer.write_eof()
                assert await reader.read() == b""
                await untouched(store, port)

    asyncio.run(main())


def test_strangers_that_hold_connections_open_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "STRANGERS", 8)

    async def main() -> None:
        async with serving() as (store, port, _said):
            idle = [await asyncio.open_connection(HOST, port) for _ in range(40)]
            await untouched(store, port)
            for _, writer in idle:
                writer.close()

    asyncio.run(main())


def test_who_goes_without_a_word_is_not_told_of() -> None:
    """A node that has changed its mind about a snapshot would be called a stranger."""

    async def main() -> None:
        async with serving() as (store, port, said):
            reader, writer = await asyncio.open_connection(HOST, port)
            await reader.readexactly(1)
            writer.close()
            await untouched(store, port)
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET /")
            writer.write_eof()
            await reader.read()
            writer.close()
            await untouched(store, port)
            assert len(said) == 1
            assert "no proof (5 bytes" in said[0]

    asyncio.run(main())


def test_a_silent_stranger_is_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE", 0.05)

    async def main() -> None:
        async with serving() as (_store, port, said):
            reader, _writer = await asyncio.open_connection(HOST, port)
            await reader.read()
            assert "said nothing" in said[0]

    asyncio.run(main())


@pytest.mark.parametrize(
    "message",
    [
        {"op": "put", "key": "no slash", "value": "x", "expected": None, "lease": None},
        {"op": "put", "key": "a/b"},
        {"op": "shut down"},
        {"op": "read"},
        {"op": "watch", "directory": "a/", "since": "x"},
    ],
)
def test_a_wrong_request_is_refused_and_the_connection_lives(message: dict[str, object]) -> None:
    async def main() -> None:
        async with serving() as (_store, port, _said):
            member = TcpStore(HOST, port, SECRET)
            with pytest.raises(ValueError):
                await member._call(message)
            connection = member._wire
            assert (await member.read("job/")).entries
            assert member._wire is connection
            await member.close()

    asyncio.run(main())


def test_a_server_that_comes_back_is_found_again_and_says_all_it_knows() -> None:
    async def main() -> None:
        async with serving() as (_store, port, _said):
            member = TcpStore(HOST, port, SECRET)
            seen = await member.read("job/")
            waiting = asyncio.ensure_future(member.changes("job/", seen.revision, 20.0))
            await member.read("job/")
        with pytest.raises(StoreError):
            await waiting
        with pytest.raises(StoreError):
            await member.read("job/")
        async with serving(port=port) as (store, _, _said):
            await store.put("job/order", "again")
            view = await member.changes("job/", seen.revision, 20.0)
            assert view.whole, "what was removed meanwhile cannot be told otherwise"
            assert view.entries["job/order"].value == "again"
            await member.close()

    asyncio.run(main())


def test_a_watcher_that_does_not_listen_is_sent_what_there_is_when_it_does() -> None:
    """Not all that there was: a node that hangs would fill the memory of the one that leads."""

    async def main() -> None:
        async with serving() as (store, port, _said):
            reader, writer = await asyncio.open_connection(HOST, port)
            watcher = await wire.greet(reader, writer, SECRET)
            since = store.table.revision
            watcher.send({"op": "watch", "id": 1, "directory": "job/", "since": since})
            assert await watcher.receive() == {"id": 1, "ok": None}
            values = [f"{number} " + "x" * 1_000_000 for number in range(40)]
            for value in values:
                await store.put("job/order", value)
                await asyncio.sleep(0)
            frames = 0
            while since < store.table.revision:
                frame = await watcher.receive()
                assert frame["since"] == since
                since, frames = frame["revision"], frames + 1
            assert frame["entries"]["job/order"] == [values[-1], since]
            assert frames < len(values) / 2
            watcher.close()
            await untouched_by(store)

    async def untouched_by(store: MemoryStore) -> None:
        await store.put("job/order", "run")

    asyncio.run(main())


def test_changes_beyond_memory_are_answered_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.edge.store.table.REMEMBERED", 4)
    table = Table(100)
    first = table.put("node/gone", "x", None, None)
    assert first is not None
    table.put("node/gone", None, None, None)
    for number in range(6):
        table.put("node/a", str(number), None, None)
    view = table.changes("node/", first)
    assert view.whole
    assert set(view.entries) == {"node/a"}
    assert not table.changes("node/", table.revision - 2).whole
    assert table.changes("node/", table.revision + 5).whole, "of an earlier life, with a clock that was ahead"


def test_leases_do_not_run_out_while_nobody_could_renew_them() -> None:
    """The machine slept; that is no death of its nodes."""
    table = Table(0)
    lease = table.grant(5.0, 0.0)
    table.put("node/a", "x", None, lease)
    for moment in (0.5, 1.0, 1.5):
        assert table.expire(moment) == []
    assert table.expire(1000.0) == []
    assert table.renew(lease, 1000.1)
    for moment in range(10001, 10060):
        if table.expire(moment / 10):
            break
    assert moment / 10 == pytest.approx(1005.1, abs=0.11)
