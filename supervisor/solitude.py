"""A node that does not reach the store: what it does with its ranks meanwhile, whether it leads or follows (``decide/fencing``)."""

from __future__ import annotations

from typing import Final

from supervisor.attempt import Attempt
from supervisor.config import Options
from supervisor.decide.fencing import Isolation, isolated
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.edge.control import Phase, Word

LONGEST_ALONE: Final = 60.0  # seconds that a decision is waited for without the store


class Solitude:
    """Of one node, asked again and again."""

    def __init__(self, options: Options, console: Console) -> None:
        self._lease, self._console = options.lease, console
        self._patience = min(options.node_timeout, LONGEST_ALONE)
        self._attempt: int | None = None
        self._steps = 0
        self._moved = 0.0  # when the ranks last made a step
        self.is_alone = False

    def look(self, silent: float, problem: str, attempt: Attempt | None, *, stopping: bool) -> Isolation:
        """What to do, given the seconds since the store was last heard of, why, and the attempt that runs here, if any."""
        now = clock.monotonic()
        live = attempt is not None and not attempt.ended.is_set()
        if live and attempt is not None:
            steps = sum(seat.step for seat in attempt.seats.values())
            if (attempt.number, steps) != (self._attempt, self._steps):
                self._attempt, self._steps, self._moved = attempt.number, steps, now
        if silent < self._lease:
            if self.is_alone:
                self._console.say("the store is reached again")
            self.is_alone = False
            return Isolation.GO_ON
        if not self.is_alone:
            self.is_alone = True
            self._console.say(f"the store is not reached ({problem}); training goes on as long as it can")
        waits = attempt is not None and any(
            seat.page[Word.PHASE] == Phase.RESTORE for seat in attempt.seats.values()
        )
        moved = now - self._moved if live and self._steps and not waits else None
        found = isolated(
            silent=silent,
            lease=self._lease,
            patience=self._patience,
            moved=moved,
            needs_decision=not live or stopping,
        )
        if found is Isolation.END:
            self._console.say("the ranks stand still and the store is not reached: they are ended here")
        return found
