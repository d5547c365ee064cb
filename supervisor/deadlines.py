"""The time that the job has left: asked of the engine now and then, heard in notices, journalled, and kept by stopping
early enough. The nearer of the two holds.

Also how long a stop may take once it has begun: signals come without a reason, so the engine is asked at once what they mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Final

from supervisor.decide import deadline as decide
from supervisor.decide.deadline import Costs, Deadline
from supervisor.edge import clock
from supervisor.engine import Engine
from supervisor.ledger import Ledger
from supervisor.model import DeadlineSet

_SAME: Final = 2.0  # seconds by which two answers may differ and mean the same
_SHORTEST: Final = 1.0  # seconds between two looks
_FIRST: Final = 2.0  # likewise, doubling up to the engine's period while nobody has said anything yet


class Deadlines:
    """Of one run. ``stop`` is called with who says so and when it will be too late, until it returns that the job does stop."""

    def __init__(
        self, engine: Engine, ledger: Ledger, grace: float, stop: Callable[[Deadline], bool]
    ) -> None:
        self._engine, self._ledger, self._grace, self._stop = engine, ledger, grace, stop
        self._known: Deadline | None = None  # the engine's
        self._known_at = 0.0
        self._noticed: Deadline | None = None
        self._noticed_at = 0.0
        self._news = asyncio.Event()

    async def watch(self) -> None:
        """Look until the stop is called for, then no more. Cancel it to end it before."""
        asks = not math.isinf(self._engine.period)
        period = min(_FIRST, self._engine.period) if asks else math.inf
        while True:
            self._news.clear()
            if asks:
                period = self._engine.period if await self.look() else min(2 * period, self._engine.period)
            due, deadline = self._due()
            if deadline is not None and due <= 0 and self._stop(deadline):
                return
            # a limit may have been moved: look once more before acting on it
            wait = max(_SHORTEST, min(period, due or period))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), None if math.isinf(wait) else wait)

    @property
    def nearest(self) -> Deadline | None:
        """What is known now."""
        both = [one for one in (self._known, self._noticed) if one is not None]
        return min(both, key=lambda one: one.end, default=None)

    def hear(self, deadline: Deadline | None) -> None:
        """What the notices that stand say; None: nothing."""
        before = self.nearest
        if deadline is not None and (self._noticed is None or abs(deadline.end - self._noticed.end) > _SAME):
            self._noticed_at = clock.now()
        self._noticed, now = deadline, clock.now()
        nearest = self.nearest
        if nearest is not None and (before is None or abs(nearest.end - before.end) > _SAME):
            self._ledger.add(DeadlineSet(time=now, source=nearest.source, deadline=nearest.end))
        self._news.set()

    async def look(self) -> Deadline | None:
        """Ask the engine, and remember the answer; an engine that does not answer has not changed its mind."""
        found = await self._engine.deadline()
        if found is None:
            return self._known
        if self._known is None or abs(found.end - self._known.end) > _SAME:
            self._known_at = clock.now()
            self._ledger.add(DeadlineSet(time=self._known_at, source=found.source, deadline=found.end))
        self._known = found
        return found

    def patience(self, began: float) -> float:
        """How long a stop that begins at that time may take, by what is known."""
        return self.patience_for(self.nearest, began)

    def patience_for(self, deadline: Deadline | None, began: float) -> float:
        """… by that deadline alone."""
        return decide.patience(deadline, began, self._costs(), self._grace)

    def _due(self) -> tuple[float, Deadline | None]:
        """Seconds until the stop must begin for the first of them, and for which."""
        costs = self._costs()
        found: tuple[float, Deadline | None] = (math.inf, None)
        for deadline, at in ((self._known, self._known_at), (self._noticed, self._noticed_at)):
            if deadline is not None:
                due = decide.stop_at(deadline, at, costs, self._grace) - clock.now()
                found = min(found, (due, deadline), key=lambda one: one[0])
        return found

    def _costs(self) -> Costs:
        record = self._ledger.record
        saved, copied = record.checkpoint, record.snapshot
        save = (
            None
            if saved is None or not saved.seconds
            else saved.seconds + (copied.seconds if copied else 0.0)
        )
        return Costs(save=save, step=1 / record.rate if record.rate else None)
