"""Weights that are not trained: copied behind the steps, in their own time, and held to what the snapshot before has of them.

No optimizer changes them, so no optimizer waits for their copy. But what else may change them (an average of other weights, the
target of a critic, an adapter that is merged into its base) keeps no rule. So they are looked at in three ways:

- At the save point, by the *versions* of all. Those that were written since the last one, or lie elsewhere, are let go of: copied
  while the training stands, then and from then on. What writes through ``.data`` is not counted.
- When they are copied, by *comparing* each byte with what the last whole snapshot has in the same place; the first was taken while the
  training stood. So what was written around the counters, and stays, is found, however little of it there is.
- By *samples*, as trained weights are: what was there at the save point must be what was copied. So is found what was written
  around the counters and taken back before the copy, unless it was little.

A snapshot in which they differ is dropped, that is said, and those that do are let go of; after a few times, all of them.

It costs the thread that copies another reading of both, and the training a look at a counter of each.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Final

import torch

from supervisor.training import gpu
from supervisor.training.bindings import Bindings
from supervisor.training.flight import Samples, new_scratch
from supervisor.training.moves import Source, are_equal, versions
from supervisor.training.overlap import can_wait
from supervisor.training.planning import Layout, TensorPlace
from supervisor.training.slots import Slot

WRITTEN: Final = "weights that are not trained were written"
_DROPPED: Final = 3  # snapshots; after as many, nothing is believed any more

Stretches = list[list[TensorPlace]]  # places between which only what never changes lies


class Frozen:
    """Those of a layout that nothing was seen to write so far. ``key in frozen`` tells which.

    ``generation`` counts up when some do not belong to them any more.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._written: set[str] = set()  # keys; of any layout
        self._dropped = 0
        self._sources: dict[str, Source] = {}  # by key
        self._bound = 0  # the generation of the bindings that these are of
        self._counters: list[torch.Tensor] = []
        self._keys: list[str] = []  # of each counter
        self._versions: list[int] = []  # of each counter, at the last look
        self._before: Slot | None = None
        self._scratch = new_scratch()
        self._numbers = itertools.count()
        self._samples: Samples | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._sources

    def start_anew(self, layout: Layout | None, bindings: Bindings | None) -> None:
        """With another layout, or none."""
        self._before = None
        self._sources = {}
        if layout is not None and bindings is not None and self._dropped < _DROPPED:
            keys = layout.constant - self._written
            self._sources = {
                place.key: source
                for place, source in bindings.sources
                if place.key in keys and can_wait(source.tensor)
            }
            self._bound = bindings.generation
        counted = [(key, counter) for key, source in self._sources.items() for counter in source.counters]
        self._keys, self._counters = [key for key, _ in counted], [counter for _, counter in counted]
        self._versions = versions(self._counters)

    # ------------------------------------------------------------------ at the save point

    def look(self, bindings: Bindings) -> None:
        """Let go of those that were written since the last look, as far as that is counted, or lie elsewhere."""
        if bindings.generation != self._bound:
            self._bound = bindings.generation
            known = self._sources
            self._let_go(
                place.key for place, source in bindings.sources if known.get(place.key, source) is not source
            )
        if (now := versions(self._counters)) != self._versions:
            counts = zip(self._keys, self._versions, now, strict=True)
            self._let_go(key for key, before, count in counts if count != before)

    def may_wait(self, slot: Slot) -> bool:
        """Whether there is another slot to compare this one with, for what is copied into it behind the step."""
        return self._before is not None and self._before.directory != slot.directory

    def note(self, slot: Slot) -> None:
        """Samples of now."""
        self._samples = slot.samples_of_frozen
        if self._samples is None or self._samples.moves is not slot.frozen:
            self._samples = self._chosen(slot)
        self._samples.note()

    def is_whole(self, slot: Slot) -> None:
        """What it holds is what the next ones are compared with."""
        self._before = slot

    # ------------------------------------------------------------------ when they are copied

    def copy(self, slot: Slot) -> str | None:
        """Copy them, and tell what is wrong then, if anything is; on the copying thread."""
        samples = self._samples
        assert samples is not None
        assert samples.moves is slot.frozen
        with gpu.beside(slot.frozen.devices):
            slot.frozen.run()
        is_found = self.find_written(slot)
        differs = samples.differ() or samples.differ_on_gpu()
        slot.samples_of_frozen = self._chosen(slot)
        if not (is_found or differs):
            return None
        self._dropped += 1
        if not is_found or self._dropped == _DROPPED:
            self._let_go(list(self._sources))  # whichever it was
        return WRITTEN

    def find_written(self, slot: Slot) -> bool:
        """Compare those in this slot, and let go of those that differ; whether some do."""
        before = self._before
        if before is None or before.directory == slot.directory:
            return False
        found = [
            place.key
            for stretch in slot.stretches
            if not _are_equal(slot, before, stretch[0], stretch[-1])
            for place in stretch
            if not _are_equal(slot, before, place, place)
        ]
        self._let_go(found)
        return bool(found)

    def close(self) -> None:
        """For good."""
        self.start_anew(None, None)
        self._samples = None
        if self._scratch >= 0:
            os.close(self._scratch)
            self._scratch = -1

    # ------------------------------------------------------------------

    def _let_go(self, keys: Iterable[str]) -> None:
        gone = self._sources.keys() & set(keys)
        if not gone:
            return
        self.generation += 1
        self._written |= gone
        self._sources = {key: source for key, source in self._sources.items() if key not in gone}
        stay = [key not in gone for key in self._keys]
        self._keys = list(itertools.compress(self._keys, stay))
        self._counters = list(itertools.compress(self._counters, stay))
        self._versions = list(itertools.compress(self._versions, stay))

    def _chosen(self, slot: Slot) -> Samples:
        return Samples(slot.frozen, self._scratch, next(self._numbers))


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
