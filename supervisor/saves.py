"""Who is told of what ranks say about saves, where an attempt runs on several nodes: this node's hand, and (``lead``) the leader."""

from __future__ import annotations

from typing import Protocol

from supervisor.fleet import Saved
from supervisor.hand import Hand
from supervisor.lead import Lead
from supervisor.model import ProposalFlag
from supervisor.shared_snapshots import SharedSnapshots


class Saves(Protocol):
    """What the reception does about the saves that ranks speak of."""

    def request(self, step: int) -> None:
        """A rank asks for a checkpoint of ``step``."""
        ...

    def standing(self, rank: int, step: int) -> None:
        """A rank has stopped at ``step`` until it gets a verdict."""
        ...

    def served(self, step: int) -> ProposalFlag:
        """The snapshot of ``step`` is whole on this node: what it was asked for, if it was, and if that is known."""
        ...

    def failed(self, step: int, reason: str) -> None:
        """The save at ``step`` came to nothing."""
        ...


class Agreed(Saves, Protocol):
    """… and what the clock of an attempt wants of them."""

    rate: float | None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted and nothing is out."""
        ...

    def want(self, flags: ProposalFlag) -> None:
        """Have all ranks save soon, at one step."""
        ...

    def recall_stop(self) -> bool:
        """Nobody wants a stop any more: whether no rank has heard of it yet."""
        ...

    def pump(self) -> None:
        """Do what could not be done before."""
        ...


class NodeSaves:
    """On each node: all goes into its report."""

    def __init__(self, hand: Hand, snapshots: SharedSnapshots) -> None:
        self._hand, self._snapshots = hand, snapshots

    def request(self, step: int) -> None:
        """Reported; the leader proposes."""
        self._hand.request(step)

    def standing(self, rank: int, step: int) -> None:
        """For this node's next look."""
        self._hand.standing(rank, step)

    def served(self, step: int) -> ProposalFlag:
        """This node's part is whole; the leader looks whether all are."""
        self._hand.saved(self._snapshots.last_part(step))
        return ProposalFlag(0)

    def failed(self, step: int, reason: str) -> None:
        """Of one node is of all."""
        attempt = self._hand.attempt
        slot = self._snapshots.failed_slot
        self._hand.saved(
            Saved(
                attempt=attempt.number if attempt else 0,
                step=step,
                slot=-1 if slot is None else slot,
                reason=reason,
            )
        )


class LeaderSaves(NodeSaves):
    """On the leader's: what the clock wants is agreed among all."""

    def __init__(self, hand: Hand, snapshots: SharedSnapshots, lead: Lead) -> None:
        super().__init__(hand, snapshots)
        self._lead = lead

    @property
    def rate(self) -> float | None:
        """Steps a second."""
        return self._lead.rounds.rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        self._lead.rounds.rate = rate

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted and nothing is out."""
        return self._lead.rounds.is_idle

    def want(self, flags: ProposalFlag) -> None:
        """Have all ranks save soon, at one step."""
        self._lead.want(flags)

    def recall_stop(self) -> bool:
        """Nobody wants a stop any more."""
        return self._lead.rounds.recall_stop()

    def pump(self) -> None:
        """The leader looks at it with every report."""
