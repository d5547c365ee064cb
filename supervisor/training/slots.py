"""A slot's arenas for a layout: what never changes in it is written here, once; and that can be done ahead."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from supervisor.checkpoint.stamps import CONSTANT, UNFINISHED
from supervisor.training.arena import Arena
from supervisor.training.bindings import Placed
from supervisor.training.flight import Samples
from supervisor.training.moves import Moves, Spot
from supervisor.training.planning import Layout, TensorPlace


def new_arenas(directory: Path, layout: Layout, device: torch.device | None) -> list[Arena | None]:
    """The arenas of this rank, allocated, with all heads and tails; None for a file without contents. Raises OSError.

    ``device`` is one that copies into them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    try:
        arenas = [_new_arena(directory / name, file, layout, made) for file, name in enumerate(layout.names)]
    except OSError:
        for path in made:  # give back what there was
            path.unlink(missing_ok=True)
        raise
    for arena in arenas:
        if device is not None and arena is not None:
            arena.register(device)
    return arenas


def _new_arena(path: Path, file: int, layout: Layout, made: list[Path]) -> Arena | None:
    if layout.sizes[file] == 0:
        path.unlink(missing_ok=True)
        return None
    arena = Arena(path, layout.sizes[file])
    made.append(path)
    end = 0
    tensors = [place for place in layout.tensors if place.file == file]
    spans = [(place.offset, place.archive.length) for place in tensors]
    spans += [(place.offset, place.room.length) for place in layout.blobs if place.file == file]
    for offset, length in sorted(spans):
        arena.put(end, bytes(offset - end))
        end = offset + length
    for place in tensors:
        arena.put(place.offset, place.archive.head)
        arena.put(place.payload + place.archive.payload, place.archive.tail)
    at, stamp = layout.stamp(file, UNFINISHED)
    arena.put(end, bytes(at - end))
    arena.put(at, stamp)
    return arena


@dataclass
class Slot:
    """A slot that is laid out: its arenas, the blobs that it holds, and what is prepared for copying."""

    directory: Path
    arenas: list[Arena | None]  # by file; None: this rank writes nothing there
    blobs: list[bytes | None]
    generation: object = None
    now: Moves = field(default_factory=Moves)
    behind: Moves = field(default_factory=Moves)
    frozen: Moves = field(default_factory=Moves)
    stretches: list[list[TensorPlace]] = field(default_factory=list)  # where those are, side by side
    samples: Samples | None = None  # for the next copy of ``behind``, if they were chosen already
    samples_of_frozen: Samples | None = None  # likewise

    @property
    def is_in_place(self) -> bool:
        """Whether its files still are those that are mapped."""
        return all(arena is None or arena.is_in_place for arena in self.arenas)

    @property
    def is_worth_waiting_for(self) -> bool:
        """Whether anything is to be copied that need not be at once."""
        return bool(self.behind.tensors or self.frozen.tensors)

    def moves_of(self, placed: Placed, spots: Mapping[str, Spot]) -> Moves:
        """What copies these tensors here."""
        moves = Moves()
        for place, source in placed:
            if (arena := self.arenas[place.file]) is not None:
                moves.add(arena, spots[place.key], source)
        return moves

    def fill(self, layout: Layout, archives: list[bytes]) -> None:
        """Write the blobs that it does not hold yet."""
        for number, (place, data) in enumerate(zip(layout.blobs, archives, strict=True)):
            if (arena := self.arenas[place.file]) is not None and self.blobs[number] is not data:
                arena.put(place.offset, data)
                self.blobs[number] = data

    def stamp(self, layout: Layout, step: int) -> None:
        """Say of what step it is: ``UNFINISHED`` before anything is written, the step when all is."""
        for number, arena in enumerate(self.arenas):
            if arena is not None and (step != UNFINISHED or number != CONSTANT):
                arena.put(*layout.stamp(number, step))


class Ahead:
    """The arenas of a slot, made by another thread before it is offered: only where there is no snapshot."""

    def __init__(self, directory: Path, layout: Layout, device: torch.device | None) -> None:
        self._directory = directory
        self._device = device
        self._layout = layout
        self._over = threading.Event()
        self._taken = threading.Lock()
        self._arenas: list[Arena | None] | None = None

    def run(self) -> None:
        """Make them, unless somebody could not wait for that."""
        if self._taken.acquire(blocking=False):
            try:
                self._arenas = new_arenas(self._directory, self._layout, self._device)
            except OSError:
                self._arenas = None  # whoever needs them tries again, and reports
            finally:
                self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether they were made, or could not be."""
        return self._over.is_set()

    def result(self) -> list[Arena | None] | None:
        """What was made. Waits if they are being made."""
        if self._taken.acquire(blocking=False):
            return None  # not begun: it never will
        self._over.wait()
        arenas, self._arenas = self._arenas, None
        return arenas
