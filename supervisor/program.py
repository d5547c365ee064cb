"""What the user wants run, as far as the supervisor cares: how the command line was understood is ``launch``'s business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


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

    def attempt_argv(self, port: int) -> Sequence[str]:
        """The command line of one attempt, whose rendezvous is at ``port`` on this host."""
        ...
