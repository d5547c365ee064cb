"""A slot's arena for a layout: what never changes in it is written here, once; and that can be done ahead."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.training.arena import Arena
from supervisor.training.moves import Moves
from supervisor.training.planning import Layout


def new_arena(directory: Path, layout: Layout) -> Arena | None:
    """The arena of this rank, allocated, with all heads and tails; None if it writes nothing. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / layout.name
    if layout.size == 0:
        path.unlink(missing_ok=True)
        return None
    arena = Arena(path, layout.size)
    end = 0
    spans = [(place.offset, place.archive.length) for place in layout.tensors]
    spans += [(place.offset, place.room.length) for place in layout.blobs]
    for offset, length in sorted(spans):
        arena.put(end, bytes(offset - end))
        end = offset + length
    for place in layout.tensors:
        arena.put(place.offset, place.archive.head)
        arena.put(place.payload + place.archive.payload, place.archive.tail)
    return arena


@dataclass
class Slot:
    """A slot that is laid out: its arena, the blobs that it holds, and what is prepared for copying."""

    arena: Arena | None  # None: this rank writes nothing
    blobs: list[bytes | None]
    generation: object = None
    now: Moves = field(default_factory=Moves)
    behind: Moves = field(default_factory=Moves)

    def fill(self, layout: Layout, archives: list[bytes]) -> None:
        """Write the blobs that it does not hold yet."""
        for number, (place, data) in enumerate(zip(layout.blobs, archives, strict=True)):
            if self.arena is not None and self.blobs[number] is not data:
                self.arena.put(place.offset, data)
                self.blobs[number] = data


class Ahead:
    """An arena that another thread makes, before its slot is offered: only where there is no snapshot."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory = directory
        self._layout = layout
        self._over = threading.Event()
        self._taken = threading.Lock()
        self._arena: Arena | None = None

    def run(self) -> None:
        """Make it, unless somebody could not wait for that."""
        if self._taken.acquire(blocking=False):
            try:
                self._arena = new_arena(self._directory, self._layout)
            except OSError:
                self._arena = None  # whoever needs it tries again, and reports
            finally:
                self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether it was made, or could not be."""
        return self._over.is_set()

    def result(self) -> Arena | None:
        """What was made of it. Waits if it is being made."""
        if self._taken.acquire(blocking=False):
            return None  # not begun: it never will
        self._over.wait()
        arena, self._arena = self._arena, None
        return arena
