"""The store inside one process: the fake of the tests, and how the node that serves ``tcp://`` uses it itself."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from supervisor.edge import clock
from supervisor.edge.store.protocol import View, directory_of
from supervisor.edge.store.table import Table

LOOK = 0.1  # seconds between two looks at the leases


class MemoryStore:
    """A Store on a table of this process. Entering the context is what makes leases run out."""

    def __init__(self, table: Table | None = None) -> None:
        self.table = table or Table(int(clock.now() * 1e6))  # faster than it changes
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._watch: asyncio.Task[None] | None = None
        #: told of every directory in which something has changed
        self.on_change: Callable[[str], None] = lambda _directory: None

    async def __aenter__(self) -> MemoryStore:
        self._watch = asyncio.get_running_loop().create_task(self._expire_for_ever())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def read(self, directory: str) -> View:
        """As the protocol says."""
        return self.table.read(directory)

    async def changes(self, directory: str, since: int, patience: float) -> View:
        """As the protocol says."""
        view = self.table.changes(directory, since)
        if not view.is_empty:
            return view
        change = asyncio.get_running_loop().create_future()
        self._waiting[directory].add(change)
        try:
            await asyncio.wait({change}, timeout=patience)
        finally:
            self._waiting[directory].discard(change)
        return self.table.changes(directory, since)

    async def put(
        self, key: str, value: str | None, *, expected: int | None = None, lease: int | None = None
    ) -> int | None:
        """As the protocol says."""
        return self.set(key, value, expected, lease)

    def set(self, key: str, value: str | None, expected: int | None, lease: int | None) -> int | None:
        """``put`` for who is in this thread."""
        before = self.table.revision
        revision = self.table.put(key, value, expected, lease)
        if self.table.revision != before:
            self._changed(key)
        return revision

    async def grant(self, seconds: float) -> int:
        """As the protocol says."""
        return self.grant_now(seconds)

    async def renew(self, lease: int) -> bool:
        """As the protocol says."""
        return self.renew_now(lease)

    def grant_now(self, seconds: float) -> int:
        """``grant`` for who is in this thread."""
        return self.table.grant(seconds, clock.monotonic())

    def renew_now(self, lease: int) -> bool:
        """``renew`` for who is in this thread."""
        return self.table.renew(lease, clock.monotonic())

    async def close(self) -> None:
        """Nothing runs out any more."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None

    async def _expire_for_ever(self) -> None:
        while True:
            for key in self.table.expire(clock.monotonic()):
                self._changed(key)
            await asyncio.sleep(LOOK)

    def _changed(self, key: str) -> None:
        directory = directory_of(key)
        for change in self._waiting.pop(directory, ()):
            if not change.done():
                change.set_result(None)
        self.on_change(directory)
