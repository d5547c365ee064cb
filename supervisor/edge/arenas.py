"""The arenas of this node as they lie there: what they need, what they hold, and whether there is room for more.

Arenas are allocated in full before anything is written into them, so the files themselves tell what a slot takes from the
first plan on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.edge import memory, mounts
from supervisor.edge.control import SLOTS
from supervisor.edge.files import free_bytes

MARGIN: Final = 1 / 8  # of the memory that is available: left to the training


@dataclass(frozen=True, kw_only=True)
class Arenas:
    """All in bytes. ``slot``: what one takes; ``held``: what all of them take in memory; ``on_disk``: likewise, on disk."""

    place: str
    slots: int
    slot: int
    held: int
    on_disk: int
    free: int  # in the file system of ``place``
    limit: int | None  # of the supervisor's cgroups; None: there is none

    @property
    def needed(self) -> int:
        """What all slots take once each was written."""
        return self.slots * self.slot


def measure(runtime: Path, supervisor: int | None) -> Arenas | None:
    """The arenas in a job's runtime directory; None while there are none, or where they cannot be looked at."""
    folders = [runtime / "slots" / str(index) for index in range(SLOTS)]
    try:
        sizes = [_size(folder) for folder in folders]
        free = free_bytes(runtime)
    except OSError:
        return None
    if not any(size for size, _ in sizes):
        return None
    on_disk = sum(
        held for folder, (_, held) in zip(folders, sizes, strict=True) if not mounts.is_in_memory(folder)
    )
    return Arenas(
        place=str(runtime.parent.parent) if mounts.is_in_memory(runtime) else str(runtime),
        slots=SLOTS,
        slot=max(size for size, _ in sizes),
        held=sum(held for _, held in sizes) - on_disk,
        on_disk=on_disk,
        free=free,
        limit=None if supervisor is None else memory.limit(supervisor),
    )


def lacking(slot: Path, size: int) -> tuple[int, int] | None:
    """What a slot of ``size`` bytes in memory still needs there and what there is for it, if that is less; else None."""
    try:
        if not mounts.is_in_memory(slot):
            return None
        missing = size - _size(slot)[1]
        room = free_bytes(slot)
    except OSError:
        return None
    if missing <= 0:
        return None
    available = memory.available()
    if available is not None:
        room = min(room, int(available * (1 - MARGIN)))
    return (missing, room) if missing > room else None


def largest(slots: Iterable[Path]) -> int:
    """What the largest of these slots is long, whole or not."""
    found = 0
    for slot in slots:
        with contextlib.suppress(OSError):
            found = max(found, _size(slot)[0])
    return found


def _size(folder: Path) -> tuple[int, int]:
    """What the files of a slot are long, and what they take."""
    size = held = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat()
            size, held = size + status.st_size, held + status.st_blocks * 512
    return size, held
