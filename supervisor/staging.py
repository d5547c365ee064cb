"""Where a checkpoint from an object store lies while the ranks read it: beside the snapshots in RAM, or in the job directory.

Removed when every rank has resumed or the attempt is over. Each is in a directory of its own, so that a fetch that nobody waits for any more
does not touch the next one's. RAM is taken only where the snapshots to come have room beside it: three slots of the same size, and as much
again to work with; or where there is no other room.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from supervisor.checkpoint.catalog import CheckpointRecord, manifest_of
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.on_demand import OnDemand
from supervisor.checkpoint.storage import CheckpointStorage
from supervisor.edge import memory
from supervisor.errors import CancelledError, StorageError

T = TypeVar("T")

NAME: Final = "staging"
ROOM: Final = 5  # times the checkpoint's size, to take RAM


class Staging:
    """The places of one node. What an earlier supervisor has left there goes at once."""

    def __init__(self, runtime: Path, job: Path) -> None:
        self._places = (runtime / NAME, job / NAME)
        self.clear()

    def whole(
        self,
        place: CheckpointStorage,
        record: CheckpointRecord,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Path:
        """The directory of a checkpoint in ``place``, every byte compared. Raises CheckpointError, StorageError."""

        def fetch(into: Path) -> Path:
            return place.fetch(record, into, cancelled=cancelled)

        return self._made(record, 1, cancelled, fetch)

    def on_demand(
        self,
        place: CheckpointStorage,
        record: CheckpointRecord,
        nodes: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> OnDemand:
        """… that this node, one of several, is to ask for what it needs. ``cancelled`` counts until this returns."""

        def begin(into: Path) -> OnDemand:
            return place.on_demand(record, into, cancelled=cancelled)

        return self._made(record, nodes, cancelled, begin)

    def _made(
        self, record: CheckpointRecord, nodes: int, cancelled: Callable[[], bool], make: Callable[[Path], T]
    ) -> T:
        if not isinstance(record.path, Remote):
            return make(record.path)
        manifest_of(record)
        if cancelled():
            raise CancelledError(f"fetching {record.path} was given up")
        place = self._room(record.path.name, record.bytes, -(-record.bytes // nodes))
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            own = Path(tempfile.mkdtemp(dir=place))
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}") from None
        try:
            (own / record.path.name).mkdir()
            return make(own / record.path.name)
        except BaseException as error:
            shutil.rmtree(own, ignore_errors=True)
            with contextlib.suppress(OSError):  # another one's is beside it
                place.rmdir()
            if isinstance(error, OSError):
                raise StorageError(f"{error.filename or own}: {error.strerror or error}") from error
            raise

    def _room(self, name: str, size: int, share: int) -> Path:
        """Where there is room for a checkpoint of ``size`` bytes, or at least for the ``share`` that the node may get by with.

        Raises StorageError where there is none.
        """
        ram, disk = self._places
        free, spare = (_room_in(place.parent) for place in (disk, ram))
        if spare >= ROOM * size:
            return ram
        for needed in (size, share):
            if free >= needed:
                return disk
            if spare >= needed:
                return ram
        raise StorageError(
            f"there is no room to fetch {name} ({share} bytes): {spare} free in {ram.parent}, {free} in {disk.parent}"
        )

    def clear(self) -> None:
        """Remove what lies there; ranks that have mapped it keep it."""
        for place in self._places:
            if os.path.lexists(place):
                shutil.rmtree(place, ignore_errors=True)


def _room_in(folder: Path) -> int:
    try:
        return memory.room(folder)
    except OSError:
        return 0
