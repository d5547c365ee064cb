"""The time that the job has left: asked of the engine now and then, journalled, and kept by stopping early enough.

Also how long a stop may take once it has begun: signals come without a reason, so the engine is asked at once what they mean.
"""

from __future__ import annotations

import asyncio
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


class Deadlines:
    """Of one run. ``stop`` is called once, with who says so and when it will be too late."""

    def __init__(
        self, engine: Engine, ledger: Ledger, grace: float, stop: Callable[[Deadline], None]
    ) -> None:
        self._engine, self._ledger, self._grace, self._stop = engine, ledger, grace, stop
        self._known: Deadline | None = None
        self._known_at = 0.0

    async def watch(self) -> None:
        """Look until the stop is called for, then no more. Cancel it to end it before."""
        if math.isinf(self._engine.period):
            return
        while True:
            await self.look()
            due = self._due_in()
            if due is not None and due <= 0:
                assert self._known is not None
                self._stop(self._known)
                return
            # a limit may have been moved: look once more before acting on it
            await asyncio.sleep(max(_SHORTEST, min(self._engine.period, due or self._engine.period)))

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
        return decide.patience(self._known, began, self._costs(), self._grace)

    def _due_in(self) -> float | None:
        if self._known is None:
            return None
        return decide.stop_at(self._known, self._known_at, self._costs(), self._grace) - clock.now()

    def _costs(self) -> Costs:
        record = self._ledger.record
        saved, copied = record.checkpoint, record.snapshot
        save = (
            None
            if saved is None or not saved.seconds
            else saved.seconds + (copied.seconds if copied else 0.0)
        )
        return Costs(save=save, step=1 / record.rate if record.rate else None)
