"""``tcp://``: the store that node 0's supervisor serves to the others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any, Final

from supervisor.edge.store import wire
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.protocol import LONGEST_VALUE, View
from supervisor.edge.store.wire import Message, Wire, WireError
from supervisor.errors import LeaseLostError, StoreError

STRANGERS: Final = 256  # connections that have not proved themselves; the oldest gives way
WAITS: Final = 64  # of one connection at a time
LONGEST_WAIT: Final = 60.0


class Server:
    """Serves ``store`` to whoever knows the secret. ``report`` is told, now and then, of those who do not."""

    def __init__(
        self, store: MemoryStore, secret: bytes, report: Callable[[str], None] = lambda _text: None
    ) -> None:
        self._store, self._secret, self._report = store, secret, report
        self._server: asyncio.Server | None = None
        self._strangers: dict[asyncio.Task[Any], None] = {}  # oldest first
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refused: set[str] = set()

    async def open(self, host: str | None, port: int) -> int:
        """Listen; the port. Raises StoreError where that cannot be."""
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, backlog=1024, reuse_address=True, family=socket.AF_UNSPEC
            )
        except OSError as error:
            raise StoreError(
                f"cannot serve the store at {host or '*'}:{port}: {error.strerror or error}"
            ) from None
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------ one connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._strangers[task] = None
        if len(self._strangers) > STRANGERS:
            next(iter(self._strangers)).cancel()
        try:
            try:
                async with asyncio.timeout(wire.HANDSHAKE):
                    connection = await wire.accept(reader, writer, self._secret)
            finally:
                self._strangers.pop(task, None)
            with contextlib.suppress(WireError, ValueError):
                await self._converse(connection)
        except (WireError, TimeoutError) as error:
            self._refuse(writer, str(error) or "it has said nothing")
        except asyncio.CancelledError:
            return
        finally:
            self._tasks.discard(task)
            writer.close()

    def _refuse(self, writer: asyncio.StreamWriter, why: str) -> None:
        peer = writer.get_extra_info("peername")
        host = str(peer[0]) if peer else "somebody"
        if host not in self._refused and len(self._refused) < STRANGERS:
            self._refused.add(host)
            self._report(f"{host} was not let in to the store: {why}")

    async def _converse(self, connection: Wire) -> None:
        waits: set[asyncio.Task[None]] = set()
        try:
            while True:
                message = await connection.receive()
                if message.get("op") != "changes":
                    connection.send(await self._answer(message))
                    continue
                if len(waits) >= WAITS:
                    raise WireError("too many waits")
                wait = asyncio.get_running_loop().create_task(self._wait(connection, message))
                waits.add(wait)
                wait.add_done_callback(waits.discard)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _wait(self, connection: Wire, message: Message) -> None:
        answer = await self._answer(message)
        with contextlib.suppress(WireError):
            connection.send(answer)

    async def _answer(self, message: Message) -> Message:
        number = message.get("id")
        try:
            return {"id": number, "ok": await self._carry_out(message)}
        except LeaseLostError as error:
            return {"id": number, "lease": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            return {"id": number, "refused": f"{type(error).__name__}: {error}"}

    async def _carry_out(self, message: Message) -> object:
        store = self._store
        match message["op"]:
            case "read":
                return plain(await store.read(str(message["directory"])))
            case "changes":
                patience = min(float(message["patience"]), LONGEST_WAIT)
                return plain(await store.changes(str(message["directory"]), int(message["since"]), patience))
            case "put":
                value, expected, lease = message["value"], message["expected"], message["lease"]
                if value is not None and len(str(value)) > LONGEST_VALUE:
                    raise ValueError(f"a value of {len(str(value))} characters")
                return await store.put(
                    str(message["key"]),
                    None if value is None else str(value),
                    expected=None if expected is None else int(expected),
                    lease=None if lease is None else int(lease),
                )
            case "grant":
                return await store.grant(float(message["seconds"]))
            case "renew":
                return await store.renew(int(message["lease"]))
            case other:
                raise ValueError(f"unknown operation {other!r}")


def plain(view: View) -> Message:
    """A view as JSON has it."""
    return {
        "revision": view.revision,
        "whole": view.whole,
        "entries": {key: [entry.value, entry.revision] for key, entry in view.entries.items()},
        "gone": list(view.gone),
    }
