"""``tcp://``: the store that node 0's supervisor serves to the others.

Thousands of nodes are served by one thread of one process, which trains beside that. So what is for many of them is put into words once, and
a connection costs no task: its requests are answered as they come. Who watches a directory is sent what changes in it, without asking
again each time; what changes while a node does not listen is sent as one when it does.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from supervisor.edge.store import wire
from supervisor.edge.store.door import Door
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.protocol import LONGEST_VALUE, View
from supervisor.edge.store.wire import Message, Wire, WireError
from supervisor.errors import LeaseLostError, StoreError

WATCHES: Final = 64  # of one connection


class Server:
    """Serves ``store`` to whoever knows the secret. ``report`` is told, now and then, of those who do not."""

    def __init__(
        self, store: MemoryStore, secret: bytes, report: Callable[[str], None] = lambda _text: None
    ) -> None:
        self._store = store
        self._door = Door(wire.STORE, secret, self._converse, report)
        self._watchers: defaultdict[str, dict[_Connection, None]] = defaultdict(dict)
        self._changed: set[str] = set()  # directories whose watchers are to be told

    async def open(self, host: str | None, port: int) -> int:
        """Listen; the port. Raises StoreError where that cannot be."""
        self._store.on_change = self._note
        try:
            return await self._door.open(host, port)
        except OSError as error:
            raise StoreError(
                f"cannot serve the store at {host or '*'}:{port}: {error.strerror or error}"
            ) from None

    async def close(self) -> None:
        """Stop serving."""
        await self._door.close()

    async def _converse(self, proved: Wire) -> None:
        connection = _Connection(self)
        connection.begin(proved)
        try:
            await connection.lost.wait()
        finally:
            for directory in connection.watched:
                self._watchers[directory].pop(connection, None)

    # ------------------------------------------------------------------ news

    def _note(self, directory: str) -> None:
        if self._watchers.get(directory):
            if not self._changed:
                asyncio.get_running_loop().call_soon(self._tell)
            self._changed.add(directory)

    def _tell(self) -> None:
        changed, self._changed = self._changed, set()
        for directory in changed:
            news: dict[int, tuple[int, bytes]] = {}  # by the revision that is known already
            for connection in self._watchers[directory]:
                if connection.listens:
                    since = connection.watched[directory]
                    if since not in news:
                        news[since] = self._news(directory, since)
                    revision, content = news[since]
                    connection.watched[directory] = revision
                    if content:
                        connection.send(content)

    def _news(self, directory: str, since: int) -> tuple[int, bytes]:
        view = self._store.table.changes(directory, since)
        if view.is_empty:
            return since, b""
        return view.revision, wire.encoded({"directory": directory, "since": since, **plain(view)})

    def catch_up(self, connection: _Connection) -> None:
        """Tell a watcher what has changed while it did not listen, or before it watched."""
        for directory, since in connection.watched.items():
            if connection.listens:
                revision, content = self._news(directory, since)
                connection.watched[directory] = revision
                if content:
                    connection.send(content)

    # ------------------------------------------------------------------ requests

    def answer(self, connection: _Connection, message: Message) -> Message:
        """What is answered."""
        number = message.get("id")
        try:
            return {"id": number, "ok": self._carry_out(connection, message)}
        except LeaseLostError as error:
            return {"id": number, "lease": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            return {"id": number, "refused": f"{type(error).__name__}: {error}"}

    def _carry_out(self, connection: _Connection, message: Message) -> object:
        store = self._store
        match message["op"]:
            case "put":
                value, expected, lease = message["value"], message["expected"], message["lease"]
                if value is not None and len(str(value)) > LONGEST_VALUE:
                    raise ValueError(f"a value of {len(str(value))} characters")
                return store.set(
                    str(message["key"]),
                    None if value is None else str(value),
                    None if expected is None else int(expected),
                    None if lease is None else int(lease),
                )
            case "renew":
                return store.renew_now(int(message["lease"]))
            case "watch":
                self._watch(connection, str(message["directory"]), int(message["since"]))
                return None
            case "read":
                return plain(store.table.read(str(message["directory"])))
            case "grant":
                return store.grant_now(float(message["seconds"]))
            case "ping":
                return None
            case other:
                raise ValueError(f"unknown operation {other!r}")

    def _watch(self, connection: _Connection, directory: str, since: int) -> None:
        if len(connection.watched) >= WATCHES and directory not in connection.watched:
            raise ValueError("too many watches")
        connection.watched[directory] = since
        self._watchers[directory][connection] = None
        asyncio.get_running_loop().call_soon(self.catch_up, connection)  # the answer goes first


class _Connection(asyncio.Protocol):
    """One that has proved to know the secret."""

    def __init__(self, server: Server) -> None:
        self._server = server
        #: the directories that it watches, and up to which revision it was told
        self.watched: dict[str, int] = {}
        #: whether what it is sent goes out at once
        self.listens = True
        self.lost = asyncio.Event()

    def begin(self, proved: Wire) -> None:
        """Answer what it asks from now on."""
        self._transport, self._frames = proved.hand_over(self)

    def send(self, content: bytes) -> None:
        """One frame, unless it has gone."""
        if not self._transport.is_closing():
            self._transport.write(self._frames.seal(content))

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it."""
        try:
            for content in self._frames.take(data):
                self.send(wire.encoded(self._server.answer(self, wire.decoded(content))))
        except (WireError, ValueError):
            self._transport.abort()

    def pause_writing(self) -> None:
        """It does not listen: nothing more is put in its way, and nothing more heard of it."""
        self.listens = False
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It listens again."""
        self.listens = True
        self._transport.resume_reading()
        self._server.catch_up(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self.lost.set()


def plain(view: View) -> Message:
    """A view as JSON has it."""
    return {
        "revision": view.revision,
        "whole": view.whole,
        "entries": {key: [entry.value, entry.revision] for key, entry in view.entries.items()},
        "gone": list(view.gone),
    }
