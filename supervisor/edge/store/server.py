"""``tcp://``: the store that node 0's supervisor serves to the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from supervisor.edge.store import wire
from supervisor.edge.store.door import Door
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.protocol import LONGEST_VALUE, View
from supervisor.edge.store.wire import Message, Wire, WireError
from supervisor.errors import LeaseLostError, StoreError

WAITS: Final = 64  # of one connection at a time
LONGEST_WAIT: Final = 60.0


class Server:
    """Serves ``store`` to whoever knows the secret. ``report`` is told, now and then, of those who do not."""

    def __init__(
        self, store: MemoryStore, secret: bytes, report: Callable[[str], None] = lambda _text: None
    ) -> None:
        self._store = store
        self._door = Door(wire.STORE, secret, self._converse, report)

    async def open(self, host: str | None, port: int) -> int:
        """Listen; the port. Raises StoreError where that cannot be."""
        try:
            return await self._door.open(host, port)
        except OSError as error:
            raise StoreError(
                f"cannot serve the store at {host or '*'}:{port}: {error.strerror or error}"
            ) from None

    async def close(self) -> None:
        """Stop serving."""
        await self._door.close()

    # ------------------------------------------------------------------ one connection

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
