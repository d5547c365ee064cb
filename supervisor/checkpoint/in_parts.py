"""A checkpoint that several nodes write, each its own files: the seam to where it comes to lie.

The leader begins it (``begin``), every node writes its files and says so, durably (``drain_part``), and when all have, the leader
makes it a checkpoint (``complete``). Wherever it lies,

- before ``complete`` nothing of it is listed, and afterwards all of it is there;
- who is cut off, late, or of an earlier attempt or epoch harms nothing that was committed: the place bears all three;
- parts are durable without a leader: what a run leaves is found by the next one (``left``), and completed or discarded.

Storage that does not answer is a StorageError in time, as with ``CheckpointStorage``; calls block.
"""

# ruff: noqa: D102 - the methods are explained by the protocol

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from supervisor.checkpoint import parts
from supervisor.checkpoint.commit import no_fence
from supervisor.checkpoint.manifest import Key, Manifest, Origin
from supervisor.checkpoint.parts import Incoming, Part
from supervisor.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Making:
    """A checkpoint in the making: ``step`` of ``attempt``, drained under ``epoch``."""

    step: int
    attempt: int
    epoch: int


class PartStorage(Protocol):
    """One job's checkpoints in parts in one place, as its supervisor of one epoch writes them."""

    def begin(
        self, making: Making, *, fence: Callable[[], None], cancelled: Callable[[], bool]
    ) -> Manifest | None:
        """Before any node writes: the manifest if it is a good checkpoint already. Raises StorageError."""
        ...

    def drain_part(
        self,
        source: Path,
        making: Making,
        names: Iterable[str],
        *,
        rank: int,
        nodes: int,
        origin: Origin,
        bandwidth: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Part:
        """Copy ``names`` of ``source`` and say so. Raises StorageError (CancelledError), with nothing said."""
        ...

    def complete(
        self,
        making: Making,
        origin: Origin | None = None,
        *,
        fence: Callable[[], None] = no_fence,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Manifest:
        """Make the checkpoint of the parts; of ``origin``, if the parts do not know all of it.

        Raises CheckpointError when one is missing or does not fit, StorageError.
        """
        ...

    def is_whole(self, making: Making) -> bool:
        """Whether all parts are there. Raises CheckpointError for one that is damaged, StorageError."""
        ...

    def left(self) -> list[Making]:
        """What this job has begun there and not completed, newest first. Raises StorageError."""
        ...

    def discard(self, making: Making) -> None:
        """Remove what is no checkpoint; gone already is fine. Raises StorageError."""
        ...


@dataclass(frozen=True)
class DirectoryParts:
    """In a directory that all nodes see (``parts`` has the guarantees)."""

    where: Path
    key: Key | None

    def begin(
        self, making: Making, *, fence: Callable[[], None], cancelled: Callable[[], bool]
    ) -> Manifest | None:
        return None

    def drain_part(
        self,
        source: Path,
        making: Making,
        names: Iterable[str],
        *,
        rank: int,
        nodes: int,
        origin: Origin,
        bandwidth: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Part:
        return parts.drain_part(
            source, self._at(making), names, rank=rank, nodes=nodes, origin=origin, key=self.key,
            bandwidth=bandwidth, cancelled=cancelled,
        )  # fmt: skip

    def complete(
        self,
        making: Making,
        origin: Origin | None = None,
        *,
        fence: Callable[[], None] = no_fence,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Manifest:
        return parts.complete(self._at(making), origin, key=self.key, fence=fence)

    def is_whole(self, making: Making) -> bool:
        return parts.read_parts(self._at(making), self.key) is not None

    def left(self) -> list[Making]:
        return [Making(step=one.step, attempt=one.attempt, epoch=one.epoch) for one in parts.left(self.where)]

    def discard(self, making: Making) -> None:
        parts.discard(self._at(making))

    def _at(self, making: Making) -> Incoming:
        return Incoming(checkpoints=self.where, step=making.step, attempt=making.attempt, epoch=making.epoch)


def finish_left(place: PartStorage, fence: Callable[[], None]) -> list[int]:
    """Make checkpoints of what earlier runs have left whole, remove what is not; the steps of those. Raises StorageError."""
    finished = []
    for making in place.left():
        try:
            if place.is_whole(making):
                place.complete(making, fence=fence)
                finished.append(making.step)
                continue
        except CheckpointError:
            pass  # it is not what its nodes have said: no more than one that is not whole
        place.discard(making)
    return finished
