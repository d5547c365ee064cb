"""``tcp://``: the client. One connection, opened when it is needed and anew when it broke."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

from supervisor.edge.store import wire
from supervisor.edge.store.protocol import ANSWER, Entry, View
from supervisor.edge.store.wire import Message, Wire, WireError
from supervisor.errors import LeaseLostError, StoreError


class TcpStore:
    """A Store at ``host:port``. A call that fails leaves the next one to connect again."""

    def __init__(self, host: str, port: int, secret: bytes, *, answer: float = ANSWER) -> None:
        self._host, self._port, self._secret, self._answer = host, port, secret, answer
        self._wire: Wire | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._awaited: dict[int, asyncio.Future[Message]] = {}
        self._watches: dict[str, _Watch] = {}  # by directory
        self._heard = 0  # frames
        #: this host's address as the store's host sees it; None before the first call
        self.local_address: str | None = None

    async def read(self, directory: str) -> View:
        """As the protocol says."""
        return _view(await self._call({"op": "read", "directory": directory}))

    async def changes(self, directory: str, since: int, patience: float) -> View:
        """As the protocol says; of one directory for one caller at a time. A silent server is asked whether it is there."""
        heard, watch = self._heard, self._watches.get(directory)
        if watch is None or watch.since != since:
            watch = self._watches[directory] = _Watch(since)
            try:
                await self._call({"op": "watch", "directory": directory, "since": since})
            except BaseException:
                self._watches.pop(directory, None)
                raise
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(
                patience
            ):  # not wait_for, which in Python 3.11 can lose a cancellation
                await watch.told.wait()
        if watch.error is not None:
            raise watch.error
        if not watch.told.is_set() and self._heard == heard:
            await self._call({"op": "ping"})
        return watch.take()

    async def put(
        self, key: str, value: str | None, *, expected: int | None = None, lease: int | None = None
    ) -> int | None:
        """As the protocol says."""
        message = {"op": "put", "key": key, "value": value, "expected": expected, "lease": lease}
        revision = await self._call(message)
        return None if revision is None else int(revision)

    async def grant(self, seconds: float) -> int:
        """As the protocol says."""
        return int(await self._call({"op": "grant", "seconds": seconds}))

    async def renew(self, lease: int) -> bool:
        """As the protocol says."""
        return bool(await self._call({"op": "renew", "lease": lease}))

    async def close(self) -> None:
        """As the protocol says."""
        self._part(StoreError("the store was closed"))
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    # ------------------------------------------------------------------ calls

    async def _call(self, message: Message) -> Any:
        number = next(self._numbers)
        try:
            async with asyncio.timeout(self._answer):
                connection = await self._connected()
                answered = self._awaited[number] = asyncio.get_running_loop().create_future()
                connection.send({**message, "id": number})
                answer = await answered
        except TimeoutError:
            self._part(StoreError(f"{self._where} does not answer"))
            raise StoreError(f"{self._where} has not answered in {self._answer:g} s") from None
        except WireError as error:
            self._part(StoreError(f"{self._where}: {error}"))
            raise StoreError(f"{self._where}: {error}") from None
        finally:
            self._awaited.pop(number, None)
        if "lease" in answer:
            raise LeaseLostError(str(answer["lease"]))
        if "refused" in answer:
            raise ValueError(str(answer["refused"]))
        return answer["ok"]

    @property
    def _where(self) -> str:
        return f"the store at {self._host}:{self._port}"

    async def _connected(self) -> Wire:
        async with self._connecting:
            if self._wire is not None:
                return self._wire
            try:
                reader, writer = await asyncio.open_connection(self._host, self._port)
            except OSError as error:
                raise WireError(error.strerror or str(error)) from None
            try:
                self._wire = connection = await wire.greet(reader, writer, self._secret)
            except BaseException:
                writer.close()
                raise
            self.local_address = connection.local_address
            self._reading = asyncio.get_running_loop().create_task(self._read(connection))
            return connection

    async def _read(self, connection: Wire) -> None:
        try:
            while True:
                answer = await connection.receive()
                self._heard += 1
                if "directory" in answer:
                    if (watch := self._watches.get(answer["directory"])) is not None:
                        watch.hear(int(answer["since"]), _view(answer))
                    continue
                awaited = self._awaited.get(answer.get("id", 0))
                if awaited is not None and not awaited.done():
                    awaited.set_result(answer)
        except (WireError, KeyError, TypeError, ValueError) as error:
            if self._wire is connection:
                self._part(StoreError(f"{self._where}: {error}"))

    def _part(self, error: StoreError) -> None:
        """Drop the connection; whoever waits for an answer does so in vain."""
        connection, self._wire = self._wire, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()
        for awaited in self._awaited.values():
            if not awaited.done():
                awaited.set_exception(error)
        for watch in self._watches.values():
            watch.fail(error)
        self._watches.clear()


class _Watch:
    """A directory whose changes the server sends by itself. ``since``: the revision that the caller knows."""

    def __init__(self, since: int) -> None:
        self.since = self._reached = since
        self.told = asyncio.Event()  # there is something to take, or nothing more will come
        self.error: StoreError | None = None
        self._whole = False
        self._entries: dict[str, Entry] = {}
        self._gone: set[str] = set()

    def hear(self, since: int, view: View) -> None:
        """What has changed between two revisions; what an earlier watch had asked for is passed over."""
        if since != self._reached:
            return
        self._reached = view.revision
        if view.whole:
            self._whole, self._entries, self._gone = True, {}, set()
        for key in view.gone:
            self._entries.pop(key, None)
            self._gone.add(key)
        self._entries |= view.entries
        self._gone -= view.entries.keys()
        self.told.set()

    def fail(self, error: StoreError) -> None:
        """Nothing more will come."""
        self.error = error
        self.told.set()

    def take(self) -> View:
        """All that was heard since the last time."""
        view = View(
            revision=self._reached,
            whole=self._whole,
            entries=self._entries,
            gone=frozenset() if self._whole else frozenset(self._gone),
        )
        self.since, self._whole, self._entries, self._gone = self._reached, False, {}, set()
        self.told.clear()
        return view


def _view(plain: Message) -> View:
    return View(
        revision=int(plain["revision"]),
        whole=bool(plain["whole"]),
        entries={
            str(key): Entry(str(value), int(revision)) for key, (value, revision) in plain["entries"].items()
        },
        gone=frozenset(map(str, plain["gone"])),
    )
