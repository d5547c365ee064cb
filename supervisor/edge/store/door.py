"""Who listens on the network: everybody may knock, who proves to know the job's secret is let in, and the rest costs nothing.

A stranger is told a nonce and may say 64 bytes; nothing is read beyond them, and nothing is kept of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

from supervisor.edge.store import wire
from supervisor.edge.store.wire import Service, Wire, WireError

STRANGERS: Final = 256  # connections that have not proved themselves; the oldest gives way


class Door:
    """Has ``converse`` talk to whoever knows the secret. ``report`` is told, once for each host, of those who do not."""

    def __init__(
        self,
        service: Service,
        secret: bytes,
        converse: Callable[[Wire], Awaitable[None]],
        report: Callable[[str], None],
    ) -> None:
        self._service, self._secret, self._converse, self._report = service, secret, converse, report
        self._server: asyncio.Server | None = None
        self._strangers: dict[asyncio.Task[Any], None] = {}  # oldest first
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refused: set[str] = set()

    async def open(self, host: str | None, port: int) -> int:
        """Listen; the port. Raises OSError where that cannot be."""
        self._server = await asyncio.start_server(
            self._serve, host, port, backlog=1024, reuse_address=True, family=socket.AF_UNSPEC
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Let nobody in any more, and put out who is there."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
                    connection = await wire.accept(reader, writer, self._secret, self._service)
            finally:
                self._strangers.pop(task, None)
            with contextlib.suppress(WireError, ValueError):
                await self._converse(connection)
        except wire.GoneError:
            pass  # nothing was asked
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
            self._report(f"{host} was not let in to the {self._service.what}: {why}")
