"""The order that a leader gives, and the reports that it gets: both are states, kept in step with the store for as long as it leads.

Thousands of nodes report at once. Each look takes all that have come meanwhile, and after it as much time is left to the others, among them
the store that brings the reports, as it has taken.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Final

from supervisor import background
from supervisor.edge import clock
from supervisor.edge.store.protocol import Store
from supervisor.errors import LeadershipLostError, StorageError, StoreError
from supervisor.fleet import Member, Order, Report
from supervisor.joining import AGAIN, Joining, Roll

BEAT: Final = 0.1  # seconds between two looks when nothing is heard
LEFT: Final = 0.05  # seconds that are left to the others after a look, at most
LOOK: Final = 10.0  # seconds of one wait for reports


class Orders:
    """Of one leader. ``on_news`` is called with the names of the nodes that have told something, and by the clock with none.

    ``on_change`` is called when the store has the order.
    """

    def __init__(self, joining: Joining, store: Store, first: Order) -> None:
        self._joining = joining
        self._roll = Roll(store)
        self.order = first
        #: a report that has seen this one is of a node that follows us
        self.first = first.serial
        self._serial = first.serial
        self._published = 0
        self._dirty = asyncio.Event()
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._leader = joining.own
        self._leaderless = 0.0  # since when nobody is said to lead
        self.deposed: str | None = None  # why this node leads no more
        self.on_news: Callable[[Collection[str]], None] = lambda _names: None
        self.on_change: Callable[[], None] = lambda: None
        self.on_deposed: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Lead from now on."""
        self._tasks = [background.start(work()) for work in (self._watch, self._publish, self._beat)]
        self._leaderless = clock.monotonic()
        self._dirty.set()

    async def close(self) -> None:
        """Lead no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fence(self) -> None:
        """Raise StorageError unless this node certainly leads: before a commit."""
        if self.deposed is not None or not self._joining.leads:
            raise StorageError("this node does not lead any more: it must not commit")

    def check(self) -> None:
        """Raise LeadershipLostError if this node leads no more."""
        if self.deposed is not None:
            raise LeadershipLostError(self.deposed)

    @property
    def silent(self) -> float:
        """Seconds since the store was last heard of."""
        return self._joining.silent

    @property
    def problem(self) -> str:
        """Why it was not reached."""
        return self._joining.problem or "it is silent"

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
                    self.depose("another node leads the job now")
                    return
            except StoreError:
                self._dirty.set()
                await asyncio.sleep(AGAIN)
                continue
            self._published = order.serial
            self._news.set()
            self.on_change()

    async def resign(self) -> None:
        """Give up the lead once the store has the order as it is. Raises LeadershipLostError."""
        await self.until(lambda: self._published == self.order.serial)
        with contextlib.suppress(StoreError):  # then the lease runs out
            await self._joining.resign()

    def depose(self, why: str) -> None:
        """This node leads no more."""
        if self.deposed is None:
            self.deposed = why
            self._news.set()
            self.on_deposed()

    async def _watch(self) -> None:
        while True:
            try:
                names = await self._roll.look(LOOK)
            except StoreError:
                await asyncio.sleep(AGAIN)
                continue
            began = clock.monotonic()
            self.on_news(names)
            self._news.set()
            await asyncio.sleep(min(clock.monotonic() - began, LEFT))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            leader = self._joining.leader
            if leader is not None:
                self._leaderless = clock.monotonic()
            if self._joining.own != self._leader:
                self.depose("the lease has run out: another node may lead the job now")
            elif leader not in (None, self._leader):
                self.depose("another node leads the job now")
            elif clock.monotonic() > self._leaderless + BEAT * 10:
                self.depose("the store does not know of a leader any more")
            if self.deposed is not None:
                return
            self.on_news(())

    async def until(self, holds: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Wait until ``holds``, looked at with every report; False once it has taken so many seconds. Raises LeadershipLostError."""
        deadline = clock.monotonic() + seconds
        while True:
            began = clock.monotonic()
            if holds():
                return True
            self.check()
            self._news.clear()
            left = deadline - clock.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(left, clock.monotonic() - began, LEFT))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), min(left, 1.0))
