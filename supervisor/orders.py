"""The order that a leader gives, and the reports that it gets: both are states, kept in step with the store for as long as it leads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from supervisor.edge import clock
from supervisor.edge.store.protocol import Store
from supervisor.errors import LeadershipLostError, StorageError, StoreError
from supervisor.fleet import Member, Order, Report
from supervisor.joining import AGAIN, Joining, Roll

BEAT: Final = 0.1  # seconds between two looks when nothing is heard
LOOK: Final = 10.0  # seconds of one wait for reports


class Orders:
    """Of one leader. ``on_news`` is called with every report and by the clock, ``on_change`` when the store has the order."""

    def __init__(self, joining: Joining, store: Store, first: Order) -> None:
        self._joining = joining
        self._roll = Roll(store)
        self.order = first
        #: a report that has seen this one is of a node that follows us
        self.first = first.serial
        self._serial = first.serial
        self._dirty = asyncio.Event()
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.deposed = False
        self.on_news: Callable[[], None] = lambda: None
        self.on_change: Callable[[], None] = lambda: None
        self.on_deposed: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Lead from now on."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work()) for work in (self._watch, self._publish, self._beat)]
        self._dirty.set()

    async def close(self) -> None:
        """Lead no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fence(self) -> None:
        """Raise StorageError unless this node certainly leads: before a commit."""
        if self.deposed or not self._joining.leads:
            raise StorageError("this node does not lead any more: it must not commit")

    @property
    def own(self) -> str:
        """This node's name."""
        return self._joining.report.name

    @property
    def own_member(self) -> Member:
        """This node, in its present life."""
        return Member(name=self._joining.report.name, life=self._joining.report.life)

    @property
    def reports(self) -> dict[str, Report]:
        """Of all nodes, by name."""
        return self._roll.reports

    def report(self, member: Member) -> Report | None:
        """What it says; None when it is gone, or has come back as another."""
        report = self._roll.reports.get(member.name)
        return report if report is not None and report.life == member.life else None

    def next_serial(self) -> int:
        """For a slot, a drain, a standby, a copy."""
        self._serial += 1
        return self._serial

    def change(self, **changes: Any) -> None:
        """Order something else."""
        self.order = replace(self.order, serial=self.order.serial + 1, **changes)
        self._dirty.set()

    async def _publish(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            order = self.order
            try:
                if not await self._joining.command(order):
                    self._depose()
                    return
            except StoreError:
                self._dirty.set()
                await asyncio.sleep(AGAIN)
                continue
            self.on_change()

    def _depose(self) -> None:
        self.deposed = True
        self._news.set()
        self.on_deposed()

    async def _watch(self) -> None:
        while True:
            try:
                await self._roll.look(LOOK)
            except StoreError:
                await asyncio.sleep(AGAIN)
                continue
            self.on_news()
            self._news.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            tenure = self._joining.tenure
            if tenure is None or not tenure.holds(clock.monotonic()) or not self._joining.leads:
                self._depose()
                return
            self.on_news()

    async def until(self, holds: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Wait until ``holds``, looked at with every report; False once it has taken so many seconds. Raises LeadershipLostError."""
        deadline = clock.monotonic() + seconds
        while not holds():
            if self.deposed:
                raise LeadershipLostError("another node leads the job now")
            self._news.clear()
            left = deadline - clock.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), min(left, 1.0))
        return True
