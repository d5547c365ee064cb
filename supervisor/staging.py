"""Where a checkpoint from an object store lies while the ranks read it: beside the snapshots in RAM, or in the job directory.

One at a time, removed when every rank has resumed or the attempt is over. RAM is taken only where the snapshots to come
have room beside it: three slots of the same size, and as much again to work with.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.on_demand import OnDemand
from supervisor.checkpoint.storage import CheckpointStorage
from supervisor.edge import memory
from supervisor.edge.files import free_bytes
from supervisor.errors import CheckpointError, StorageError

NAME: Final = "staging"
ROOM: Final = 5  # times the checkpoint's size, to take RAM


class Staging:
    """One place for one checkpoint. What an earlier supervisor has left there goes at once."""

    def __init__(self, runtime: Path, job: Path) -> None:
        self._places = (runtime / NAME, job / NAME)
        self.clear()

    def room(self, name: str, size: int, nodes: int = 1) -> Path:
        """An empty directory for a checkpoint of ``size`` bytes, of which this node, one of several, may need its share alone.

        Raises StorageError where there is no room.
        """
        self.clear()
        ram, disk = self._places
        free = [_free(place.parent) for place in self._places]
        available = memory.available()
        spare = free[0] if available is None else min(free[0], available)
        share = -(-size // nodes)
        if spare >= ROOM * size or (free[1] < share <= spare):
            place = ram
        elif free[1] >= share:
            place = disk
        else:
            raise StorageError(
                f"there is no room to fetch {name} ({share} bytes): {spare} free in {ram.parent}, {free[1]} in {disk.parent}"
            )
        target = place / name
        try:
            place.mkdir(mode=0o700)
            target.mkdir()
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}") from None
        return target

    def on_demand(self, place: CheckpointStorage, record: CheckpointRecord, nodes: int) -> OnDemand:
        """A checkpoint in ``place``, for what this node, one of several, needs of it. Raises CheckpointError, StorageError."""
        if not isinstance(record.path, Remote):
            return place.on_demand(record, record.path)
        if record.problem is not None:
            raise CheckpointError(record.problem)
        try:
            return place.on_demand(record, self.room(record.path.name, record.bytes, nodes))
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Remove what lies there; ranks that have mapped it keep it."""
        for place in self._places:
            if os.path.lexists(place):
                shutil.rmtree(place, ignore_errors=True)


def _free(folder: Path) -> int:
    try:
        return free_bytes(folder)
    except OSError:
        return 0
