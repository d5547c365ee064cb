"""What nodes show each other, and the words they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from blake3 import blake3

from supervisor.edge.store.wire import Service

SERVICE: Final = Service(b"EVPEERS1", "peer")
#: a node's rank, and of how many
Part = tuple[int, int]
ANSWER: Final = 5.0  # seconds for a connection, and for each frame that is waited for


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A complete snapshot on a node: size by name of its files, and the text of its ``slot.json``, which a copy takes along."""

    attempt: int
    step: int
    record: str
    files: Mapping[str, int]
    part: Part | None = None  # which node's part it is, where that was asked for

    @property
    def stamp(self) -> str:
        """What no other snapshot has."""
        return str(blake3(self.record.encode()).hexdigest())


class Shelf(Protocol):
    """The snapshots that a node shows to its peers. Called in threads, several at once."""

    def find(self, attempt: int, step: int, part: Part | None = None) -> Listing | None:
        """A snapshot that is complete at this moment, or one node's part of it; None: there is none."""
        ...

    def open(self, listing: Listing, name: str) -> int:
        """A descriptor of one of its files, closed by the caller. Raises OSError, CheckpointError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another node of the job, and how it is spoken to."""

    name: str
    host: str
    port: int
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"node {self.name} ({self.host}:{self.port})"
