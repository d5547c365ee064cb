"""Weights that are not trained: copied behind the steps, in their own time, and held to what the snapshot before has of them.

No optimizer changes them, so no optimizer waits for their copy. But what else may change them (an average of other weights, an
adapter that is merged into its base) keeps no rule, and leaves no trace where it writes through ``.data``. So they are not
believed: the copy is compared, byte for byte, with what the last whole snapshot has in the same place. That one was compared
likewise, and the first was taken while the training stood: so each holds what was there at its save point. A snapshot in which
some differ is dropped, that is said, and those are copied while the training stands from then on.

It costs the thread that copies another reading of both, and the training nothing.
"""

from __future__ import annotations

from typing import Final

from supervisor.training import gpu
from supervisor.training.moves import are_equal
from supervisor.training.planning import Layout, TensorPlace
from supervisor.training.slots import Slot

WRITTEN: Final = "weights that are not trained were written"

Stretches = list[list[TensorPlace]]  # places between which only what never changes lies


class Frozen:
    """Those of a layout that nothing was seen to write so far."""

    def __init__(self) -> None:
        self._written: set[str] = set()  # keys; of any layout
        self._constant: frozenset[str] = frozenset()
        self._before: Slot | None = None

    def start_anew(self, layout: Layout | None) -> None:
        """With another layout, or none."""
        self._constant = layout.constant if layout is not None else frozenset()
        self._before = None

    def __contains__(self, key: str) -> bool:
        return key in self._constant and key not in self._written

    @property
    def generation(self) -> int:
        """Counts up when some do not belong to them any more."""
        return len(self._written)

    def is_whole(self, slot: Slot) -> None:
        """What it holds is what the next ones are compared with."""
        self._before = slot

    def may_wait(self, slot: Slot) -> bool:
        """Whether there is another one to compare it with."""
        return self._before is not None and self._before is not slot

    def copy(self, slot: Slot) -> str | None:
        """Copy them, and tell what is wrong then, if anything is; any thread may do it."""
        with gpu.beside(slot.frozen.devices):
            slot.frozen.run()
        return WRITTEN if self.find_written(slot) else None

    def find_written(self, slot: Slot) -> bool:
        """Compare those in this slot, and let go, for good, of those that differ; whether some do."""
        before = self._before
        if before is None or before is slot:
            return False
        found = {
            place.key
            for stretch in slot.stretches
            if not _are_equal(slot, before, stretch[0], stretch[-1])
            for place in stretch
            if not _are_equal(slot, before, place, place)
        }
        self._written |= found
        return bool(found)


def stretches(layout: Layout, keys: set[str]) -> Stretches:
    """The places of these keys, side by side where they are."""
    found: Stretches = []
    last: TensorPlace | None = None
    for place in layout.tensors:
        if place.key in keys:
            if last is not None and last.key in keys and last.file == place.file:
                found[-1].append(place)
            else:
                found.append([place])
        last = place
    return found


def _are_equal(slot: Slot, other: Slot, first: TensorPlace, last: TensorPlace) -> bool:
    """Whether two slots hold the same from one place to another."""
    here, there = slot.arenas[first.file], other.arenas[first.file]
    assert here is not None
    assert there is not None
    size = last.payload + last.archive.payload - first.payload
    return are_equal(here.address + first.payload, there.address + first.payload, size)
