"""What the user wants run, as far as the supervisor cares: how the command line was understood is ``launch``'s business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one attempt meet, and this node's place among its nodes."""

    port: int
    address: str = "127.0.0.1"
    nodes: int = 1
    node_rank: int = 0


class Program(Protocol):
    """What the user wants run, as the command line understood it."""

    @property
    def command(self) -> tuple[str, ...]:
        """As it was given."""
        ...

    @property
    def identity(self) -> str:
        """What may not change between two runs of one job: the script or module."""
        ...

    @property
    def notices(self) -> tuple[str, ...]:
        """What was taken over from the command, to be said once."""
        ...

    @property
    def has_ranks(self) -> bool:
        """Whether torchrun starts it, so that lines are told apart by rank."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """What its workers need beside what every worker gets."""
        ...

    def attempt_argv(self, meeting: Rendezvous) -> Sequence[str]:
        """This node's command line of one attempt."""
        ...
