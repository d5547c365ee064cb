"""What has started the supervisor and may end it: a cluster's scheduler, a cloud, or nobody. Implementations are ``launch``'s."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Protocol

from supervisor.decide.deadline import Deadline


class Engine(Protocol):
    """Whoever gives the job its time."""

    @property
    def name(self) -> str:
        """What is put into the runtime directory, to tell whose it is; empty: nobody's."""
        ...

    @property
    def period(self) -> float:
        """Seconds between two questions for the deadline."""
        ...

    async def deadline(self) -> Deadline | None:
        """When the job is ended, as far as is known now; None: nobody says. Answers within seconds."""
        ...

    def leave(self, code: int, bad: Collection[str] = ()) -> str | None:
        """The supervisor's last act before it exits with ``code``: have the job run again, say. One line that says what came of it.

        Of several nodes the one that leads calls it, when the others have left. ``bad``: nodes that the job is better run without.
        """
        ...


class Alone:
    """Nobody ends the job but by signals."""

    name = ""
    period = math.inf

    async def deadline(self) -> Deadline | None:
        """Nobody says."""
        return None

    def leave(self, code: int, bad: Collection[str] = ()) -> str | None:
        """Nothing is to be done."""
        return None
