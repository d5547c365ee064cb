"""What an attempt knows of its part on other nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Others(Protocol):
    """The part of an attempt that runs on other nodes, as far as they have told."""

    @property
    def in_session(self) -> bool:
        """Whether every rank there can take part in an agreed save."""
        ...

    @property
    def steps(self) -> list[int]:
        """Completed steps, of the slowest and of the fastest rank of each node."""
        ...

    @property
    def first_step_times(self) -> list[float | None]:
        """When the last rank of each node completed its first step, in Unix seconds; None: not yet."""
        ...

    @property
    def own_shares(self) -> Mapping[int, float]:
        """Of its ranks (``decide/straggler.py``), where they are known."""
        ...

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of all of its nodes, this one's too, by rank."""
        ...
