"""The other nodes of the job, as the node that decides sees them; and how it is when there are none.

``Node`` goes through the same motions alone and among many: what differs is behind ``Companions``. ``Nobody`` answers for a node that is
alone, ``with_others.WithOthers`` for one that leads others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from supervisor.attempt import Attempt
from supervisor.fleet import Assignment
from supervisor.ledger import Ledger
from supervisor.model import Failure, ProposalFlag
from supervisor.program import Rendezvous
from supervisor.pulse import Pulse
from supervisor.resume import Resume
from supervisor.savepoints import SavePoints
from supervisor.saves import Agreed
from supervisor.standby import Standby
from supervisor.stores import Stores


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the next attempt is to this node: one of ``nodes``, the ``rank``-th of them."""

    nodes: int = 1
    rank: int = 0
    from_standby: bool = True  # where there is one
    assignment: Assignment | None = None


class Outcome(NamedTuple):
    """How an attempt has ended, on all nodes."""

    failure: Failure | None
    noticed: float | None  # when the failure was, Unix seconds
    completed: bool  # every rank has left its training for good


class Companions(Protocol):
    """The other nodes. Any call may raise LeadershipLostError: another node leads the job now."""

    @property
    def bad_nodes(self) -> Collection[str]:
        """Those that are left out at present."""
        ...

    @property
    def reshaping(self) -> str | None:
        """Why the attempt was stopped only to go on with other nodes; None: it was not."""
        ...

    async def start(self) -> None:
        """Lead."""
        ...

    async def finish(self, code: int, reason: str, *, saved: bool) -> None:
        """Have all nodes leave with that exit code."""
        ...

    async def close(self) -> None:
        """Lead no more."""
        ...

    def check(self) -> None:
        """Raise LeadershipLostError if another node leads, or may lead, the job now."""
        ...

    async def muster(self, number: int) -> Turn | None:
        """The nodes of the next attempt; None when there is to be none, because of a stop that ``Stopping`` knows."""
        ...

    def begin(self, attempt: Attempt, turn: Turn, *, from_standby: bool) -> Rendezvous | None:
        """All nodes launch it. Where its ranks meet; None: wherever the launcher likes."""
        ...

    async def choose(self, number: int, turn: Turn) -> Resume:
        """Where it resumes, on all nodes alike. Raises CheckpointError, StorageError."""
        ...

    def saves(self, attempt: Attempt) -> Agreed:
        """Who agrees on its saves."""
        ...

    def follow(self, pulse: Pulse) -> Callable[[int, ProposalFlag], None]:
        """Tell the pulse of saves that all nodes have made; what to tell of those that this node has."""
        ...

    def made_first_step(self, attempt: Attempt) -> None:
        """All ranks have: the next attempt may be made ready."""
        ...

    async def end(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        """Once it has ended on all nodes: how, from how it has here."""
        ...

    def stop(self) -> None:
        """The job is to stop."""
        ...

    def go_on(self) -> None:
        """It is not, after all."""
        ...


class Nobody:
    """There are no other nodes."""

    bad_nodes: Collection[str] = ()
    reshaping: str | None = None

    def __init__(self, stores: Stores, standby: Standby, ledger: Ledger) -> None:
        self._stores, self._standby, self._ledger = stores, standby, ledger

    async def start(self) -> None:
        """Nobody has to be told."""

    async def finish(self, code: int, reason: str, *, saved: bool) -> None:
        """Nobody else has to leave."""

    async def close(self) -> None:
        """Nothing is held."""

    def check(self) -> None:
        """Nobody else can lead."""

    async def muster(self, number: int) -> Turn | None:
        """This node."""
        return Turn()

    def begin(self, attempt: Attempt, turn: Turn, *, from_standby: bool) -> Rendezvous | None:
        """Anywhere."""
        return None

    async def choose(self, number: int, turn: Turn) -> Resume:
        """The newest that is whole here."""
        return await self._stores.choose()

    def saves(self, attempt: Attempt) -> Agreed:
        """Among the ranks of this node, over their control pages."""
        return SavePoints(attempt, self._ledger.record.skips)

    def follow(self, pulse: Pulse) -> Callable[[int, ProposalFlag], None]:
        """What this node has saved is all."""
        return pulse.saved

    def made_first_step(self, attempt: Attempt) -> None:
        """The standby is launched beside it."""
        self._standby.arm(attempt)

    async def end(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        """As it has here."""
        return outcome

    def stop(self) -> None:
        """Nobody has to be told."""

    def go_on(self) -> None:
        """Nobody has to be told."""
