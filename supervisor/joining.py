"""A node's place among the nodes of a job: its lease, its report, the order as it stands, and the leadership.

Everything here is a state that is written again until the store has it. A store that is away for a while is no error: ``silent`` says for
how long, ``tenure`` whether the lease still holds, and who has to decide something asks ``decide/fencing.py`` what that means. When the
lease has run out the node joins anew under another life: what was ordered of the old one does not concern it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from supervisor import background
from supervisor.decide.fencing import Tenure
from supervisor.edge import clock, plain
from supervisor.edge.store.protocol import Store, View
from supervisor.errors import LeaseLostError, StoreError
from supervisor.fleet import JOB, LEADER, NODES, Order, Report
from supervisor.papers import Papers, encoded

AGAIN: Final = 0.2  # seconds after a call that failed
PATIENCE: Final = 20.0  # seconds of one watch


class Joining:
    """One node. ``start`` it, set its report with ``tell``, read ``order``; ``changed`` is set when that, or the lease, changes."""

    def __init__(self, store: Store, report: Report, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self.report = report
        self._papers = Papers()
        self.order: Order | None = None
        self.leader: str | None = None  # "name life" of who leads
        self._led_since = 0  # revision of that where it is this node
        self.lease: int | None = None
        self.tenure: Tenure | None = None
        self.changed = asyncio.Event()
        self.problem: str | None = None  # why the store was not reached the last time
        self._heard = clock.monotonic()
        self._told: Report | None = None
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def revision(self) -> int:
        """Of the order."""
        return self._papers.revision

    @property
    def silent(self) -> float:
        """Seconds since the store was last heard of."""
        return clock.monotonic() - self._heard

    @property
    def has_joined(self) -> bool:
        """Whether the lease certainly holds, and the report is under it."""
        return self._told is not None and self.tenure is not None and self.tenure.holds(clock.monotonic())

    @property
    def in_force(self) -> Order | None:
        """The order, unless whoever gave it leads no more: the next leader's first one is still to come."""
        order = self.order
        return order if order is not None and self.leader in (None, order.leader) else None

    @property
    def leads(self) -> bool:
        """Whether this node leads, as far as it may count on that now."""
        return self.has_joined and self.leader == self.own

    @property
    def own(self) -> str:
        """This node, as it is called where it leads."""
        return f"{self.report.name} {self.report.life}"

    def start(self) -> None:
        """Join, and stay."""
        self._tasks = [
            background.start(work()) for work in (self._keep_lease, self._keep_report, self._watch)
        ]

    async def close(self) -> None:
        """Leave at once: the report is removed if the store can be reached."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._told is not None:
            with contextlib.suppress(StoreError):
                await self._store.put(NODES + self.report.name, None)

    def tell(self, report: Report) -> None:
        """What the node has to say from now on. Its life is ours to set."""
        self.report = replace(report, life=self.report.life)
        self._news.set()

    # ------------------------------------------------------------------ leading

    async def campaign(self) -> bool:
        """Take the leadership if nobody has it; whether this node leads now. Raises StoreError."""
        if not self.has_joined or self.lease is None:
            return False
        if self.leader is None:
            taken = await self._store.put(LEADER, self.own, expected=0, lease=self.lease)
            if taken is not None:
                self.leader, self._led_since = self.own, taken
        return self.leads

    async def resign(self) -> None:
        """Give the leadership up, so that nobody waits for the lease to run out. Raises StoreError."""
        if self.leads:
            await self._store.put(LEADER, None, expected=self._led_since)
            self.leader = None

    async def command(self, order: Order) -> bool:
        """Replace the order that this node has last seen by one with a later serial; whether that was still it.

        Raises StoreError: then it is not known, and what counts is what is there. Never done under a lease that may have run out.
        """
        if not self.leads:
            raise StoreError("the lease may have run out")
        if not await self._papers.put(self._store, order, self.own):
            return False
        self.order = order
        return True

    # ------------------------------------------------------------------ in the background

    async def _keep_lease(self) -> None:
        while True:
            began = clock.monotonic()
            try:
                if self.lease is None:
                    self.lease = await self._store.grant(self._seconds)
                    self._renewed(began)
                    self._news.set()
                elif await self._store.renew(self.lease):
                    self._renewed(began)
                else:
                    self._lost()
                    continue
            except StoreError as error:
                self._failed(error)
            pause = AGAIN if self.problem or self.tenure is None else self.tenure.pause
            await asyncio.sleep(pause)

    async def _keep_report(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self.lease is None or self._told == self.report:
                continue
            report = self.report
            try:
                if not await self._put(report):
                    self.problem = (
                        f"a node called {report.name} is part of the job already: give another --node-name"
                    )
                    self._news.set()
                    self.changed.set()
                    await asyncio.sleep(AGAIN)
                    continue
            except LeaseLostError:
                self._lost()
            except StoreError as error:
                self._failed(error)
                self._news.set()
                await asyncio.sleep(AGAIN)
            else:
                self._told = report
                self._hear()
                self.changed.set()

    async def _put(self, report: Report) -> bool:
        """Write it, the first time only where no other life of that name is; whether it is there."""
        key = NODES + report.name
        if self._told is not None:
            return await self._store.put(key, encoded(report), lease=self.lease) is not None
        if await self._store.put(key, encoded(report), expected=0, lease=self.lease) is not None:
            return True
        there = (await self._store.read(NODES)).entries.get(key)  # ours, if an answer was lost
        return there is not None and json.loads(there.value).get("life") == report.life

    async def _watch(self) -> None:
        since = -1
        while True:
            try:
                if since < 0:
                    view = await self._store.read(JOB)
                else:
                    view = await self._store.changes(JOB, since, min(PATIENCE, self._seconds))
            except StoreError as error:
                self._failed(error)
                await asyncio.sleep(AGAIN)
                continue
            self._hear()
            since = view.revision
            self._take(view)

    def _take(self, view: View) -> None:
        if view.is_empty:
            return
        if LEADER in view.entries:
            self.leader = view.entries[LEADER].value
            if self.leader == self.own:  # it was taken, and the answer was lost
                self._led_since = view.entries[LEADER].revision
        elif view.whole or LEADER in view.gone:
            self.leader = None
        if (order := self._papers.take(view)) is not None:
            self.order = order
        elif self._papers.revision == 0:  # a store that was started anew
            self.order = None
        self.changed.set()

    def _renewed(self, began: float) -> None:
        self.tenure = Tenure(seconds=self._seconds, since=began)
        self._hear()

    def _hear(self) -> None:
        self._heard, self.problem = clock.monotonic(), None

    def _failed(self, error: StoreError) -> None:
        self.problem = str(error)
        self.changed.set()

    def _lost(self) -> None:
        """The store has let the lease run out: from here on this is another life."""
        self.lease, self.tenure, self._told = None, None, None
        self.report = replace(self.report, life=new_life())
        self._news.set()
        self.changed.set()


class Roll:
    """The leader's view of all reports. ``look`` waits for news."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._since = -1
        self.reports: dict[str, Report] = {}

    async def look(self, patience: float) -> set[str]:
        """Wait for news up to ``patience`` seconds; the names of the nodes that have told something, or are gone. Raises StoreError."""
        whole = self._since < 0
        view = await (self._store.read(NODES) if whole else self._store.changes(NODES, self._since, patience))
        self._since = view.revision
        found: set[str] = set()
        if view.whole:
            found |= self.reports.keys()
            self.reports.clear()
        for key in view.gone:
            name = key.removeprefix(NODES)
            self.reports.pop(name, None)
            found.add(name)
        for key, entry in view.entries.items():
            name = key.removeprefix(NODES)
            with contextlib.suppress(ValueError, TypeError):
                self.reports[name] = plain.from_plain(Report, json.loads(entry.value))
            found.add(name)
        return found


def new_life() -> str:
    """What tells one supervisor on a node, and one lease of it, from the next."""
    return secrets.token_hex(8)


async def until(node: Joining, holds: Callable[[], bool], deadline: float = math.inf) -> bool:
    """Wait until ``holds``, looked at with every change; False once ``deadline`` (monotonic seconds) has passed."""
    while not holds():
        left = deadline - clock.monotonic()
        if left <= 0:
            return False
        node.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(node.changed.wait(), min(left, 3600.0))
    return True
