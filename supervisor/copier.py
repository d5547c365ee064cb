"""What makes a checkpoint of a snapshot: this node alone, or several together (``company``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from supervisor.checkpoint.manifest import Manifest, Origin
from supervisor.checkpoint.storage import CheckpointStorage


class Copier(Protocol):
    """What makes a checkpoint of a snapshot: ``CheckpointStorage.drain``, or several nodes together."""

    def __call__(
        self,
        storage: CheckpointStorage,
        source: Path,
        origin: Origin,
        *,
        fence: Callable[[], None],
        bandwidth: float | None,
        cancelled: Callable[[], bool],
    ) -> Manifest:
        """In a thread."""
        ...


def drained(
    storage: CheckpointStorage,
    source: Path,
    origin: Origin,
    *,
    fence: Callable[[], None],
    bandwidth: float | None,
    cancelled: Callable[[], bool],
) -> Manifest:
    """By this node alone."""
    return storage.drain(source, origin, fence=fence, bandwidth=bandwidth, cancelled=cancelled)
