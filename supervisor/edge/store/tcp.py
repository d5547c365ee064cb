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
        #: this host's address as the store's host sees it; None before the first call
        self.local_address: str | None = None

    async def read(self, directory: str) -> View:
        """As the protocol says."""
        return _view(await self._call({"op": "read", "directory": directory}))

    async def changes(self, directory: str, since: int, patience: float) -> View:
        """As the protocol says."""
        message = {"op": "changes", "directory": directory, "since": since, "patience": patience}
        return _view(await self._call(message, patience))

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

    async def _call(self, message: Message, patience: float = 0.0) -> Any:
        number = next(self._numbers)
        try:
            async with asyncio.timeout(self._answer + patience):
                connection = await self._connected()
                answered = self._awaited[number] = asyncio.get_running_loop().create_future()
                connection.send({**message, "id": number})
                answer = await answered
        except TimeoutError:
            self._part(StoreError(f"{self._where} does not answer"))
            raise StoreError(f"{self._where} has not answered in {self._answer + patience:g} s") from None
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
                awaited = self._awaited.get(answer.get("id", 0))
                if awaited is not None and not awaited.done():
                    awaited.set_result(answer)
        except (WireError, ValueError) as error:
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


def _view(plain: Message) -> View:
    return View(
        revision=int(plain["revision"]),
        whole=bool(plain["whole"]),
        entries={
            str(key): Entry(str(value), int(revision)) for key, (value, revision) in plain["entries"].items()
        },
        gone=frozenset(map(str, plain["gone"])),
    )
