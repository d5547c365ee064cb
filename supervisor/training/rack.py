"""The slots of one rank: laid out when they are first written, or ahead of that by a thread; and let go of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.training.overlap import Helper
from supervisor.training.planning import Layout, make_place
from supervisor.training.slots import Ahead, Slot, new_arenas
from supervisor.training.writer import put_index


class Rack:
    """``spare`` are the slots to make ready ahead, ``ranks`` those that share them; ``cleans``: this one clears them first.

    ``device`` is one that copies into them.
    """

    def __init__(
        self, spare: Iterable[Path], *, ranks: range, cleans: bool, device: torch.device | None
    ) -> None:
        self._spare = tuple(spare)
        self._ranks = ranks
        self._cleans = cleans
        self._device = device
        self._slots: dict[Path, Slot] = {}
        self._ahead: dict[Path, Ahead] = {}
        self._used: set[Path] = set()
        self._making = Helper("everstep-arenas")

    @property
    def is_complete(self) -> bool:
        """Whether every slot there is was laid out: whichever is next, it is there."""
        return bool(self._spare) and all(path in self._slots for path in self._spare)

    def is_being_made(self, directory: Path) -> bool:
        """Whether a thread is at work on this slot."""
        ahead = self._ahead.get(directory)
        return ahead is not None and not ahead.is_over

    def use(self, directory: Path) -> None:
        """It is about to be written: never to be made ahead any more."""
        self._used.add(directory)

    def get(self, directory: Path) -> Slot:
        """A slot that was opened."""
        return self._slots[directory]

    def open(self, directory: Path, layout: Layout) -> None:
        """Lay out this slot, if it is not. Raises OSError."""
        slot = self._slots.get(directory)
        if slot is not None and slot.is_in_place:
            return
        self._slots.pop(directory, None)
        if self._cleans:
            make_place(directory, self._ranks)
        self.make(directory, layout)
        if layout.index is not None:
            put_index(directory, layout.index)

    def make(self, directory: Path, layout: Layout) -> Slot:
        """The slot, with this rank's files laid out. Raises OSError."""
        ahead = self._ahead.pop(directory, None)
        arenas = ahead.result() if ahead is not None else None
        slot = Slot(directory, arenas or [], [None] * len(layout.blobs))
        if not arenas or not slot.is_in_place:
            slot.arenas = new_arenas(directory, layout, self._device)
        self._slots[directory] = slot
        return slot

    def make_ahead(self, layout: Layout, first: Path | None) -> None:
        """Have a thread lay out ``first``, and the spare ones that nobody has written yet."""
        # one that was written may be about to be declared a snapshot
        spare = [path for path in self._spare if path not in self._used and not (path / SLOT_NAME).exists()]
        for path in spare if first is None else [first, *spare]:
            self._ahead[path] = Ahead(path, layout, self._device)
            self._making.start(self._ahead[path].run)

    def forget(self, directory: Path) -> None:
        """Let go of a slot; nothing of it is at work or mapped any more."""
        if (ahead := self._ahead.pop(directory, None)) is not None:
            ahead.result()
        self._slots.pop(directory, None)

    def clear(self) -> None:
        """Let go of all."""
        for ahead in self._ahead.values():
            ahead.result()
        self._ahead.clear()
        self._slots.clear()

    def remove(self, directory: Path, names: Sequence[str], *, index: bool) -> None:
        """Delete files that could not be completed."""
        with contextlib.suppress(OSError):
            for name in (*names, ".metadata", ".metadata.tmp") if index else names:
                (directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of all, for good."""
        self.clear()
        self._making.close()
