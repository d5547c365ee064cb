"""What of the training goes where: the items of this rank, bound to the places of a layout.

Items that were kept (``items``) are looked into once. Of the others there are few, and they are compared each time. A tensor
that lies elsewhere in every snapshot (a generator's state is a new one each time) is *restless*: its copy is prepared anew
each time, so that those of all others need not be.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from supervisor.training.items import Deferred, Items
from supervisor.training.layout import PlainBlobs, blob, is_plain, pickled
from supervisor.training.memory import Places
from supervisor.training.moves import Source, local_of
from supervisor.training.planning import BlobPlace, Layout, TensorPlace, signature

_RESTLESS: Final = 3  # moves

Placed = list[tuple[TensorPlace, Source]]
Maker = Callable[[], bytes]  # of an archive


class _Bound:
    """A tensor item, and its place if this rank writes it."""

    __slots__ = ("key", "moved", "place", "signature", "source", "value")

    def __init__(
        self,
        key: str,
        value: torch.Tensor,
        holder: torch.Tensor | None,
        place: TensorPlace | None,
        planned: object,
    ) -> None:
        self.key = key
        self.value = value
        self.place = place
        self.signature = planned
        self.source: Source | None = None if place is None else Source(value, holder)
        self.moved = 0  # times

    def rebind(self, value: object, holder: torch.Tensor | None) -> bool:
        """Take over the value of now; whether it still fits."""
        if value is not self.value:
            if not isinstance(value, torch.Tensor) or signature(value) != self.signature:
                return False
            self.value = value
        if self.source is not None and self.place is not None:
            local = local_of(self.value)
            if not (self.source.is_same(local) and self.source.is_held_by(holder)):
                if tuple(local.shape) != self.place.shape or local.dtype != self.place.dtype:
                    return False
                self.source = Source(self.value, holder)
                self.moved += 1
        return True


class Bindings:
    """Follows the values of a layout's items from snapshot to snapshot.

    ``generation`` counts up when tensors have moved in memory: what was prepared for copying them is void then.
    """

    def __init__(self, layout: Layout, items: Items) -> None:
        self.generation = 0
        self._layout = layout
        whole = items.whole()
        places = {place.key: place for place in layout.tensors}
        self._bound = {
            key: _Bound(key, whole.values[key], whole.holders.get(key), places.get(key), planned)
            for key, planned in layout.signatures.items()
        }
        self._blobs = [_Blob(place) for place in layout.blobs]
        self._restless: list[_Bound] = []
        self._follow(items)

    def _follow(self, items: Items) -> None:
        """These are the items that were looked into last."""
        self._kept = list(items.kept)
        self._paths = dict(items.paths)
        self._fresh = [self._bound[key] for key in items.paths if key in self._bound]
        self._others = [key for key in items.paths if key not in self._bound]
        self._places = Places([bound.value for bound in self._fresh])
        for one in self._blobs:
            one.doubt()
        self._constant = {
            key: value for part in items.kept for key, value in part.values.items() if key not in self._bound
        }

    @property
    def sources(self) -> Placed:
        """The tensors that this rank writes, and where, in the order of the layout; without the restless."""
        bound = [self._bound[place.key] for place in self._layout.tensors]
        return [(b.place, b.source) for b in bound if b.moved < _RESTLESS and b.place and b.source]

    @property
    def restless(self) -> Placed:
        """Those that have moved time and again."""
        return [(b.place, b.source) for b in self._restless if b.place and b.source]

    def fit(self, items: Items) -> bool:
        """Take over new values; whether the layout still fits them."""
        if _are(self._kept, items.kept) and items.paths == self._paths:
            values = items.values
            if any(isinstance(values[key], torch.Tensor) for key in self._others):
                return False
            now = [values[bound.key] for bound in self._fresh]
            if _are([bound.value for bound in self._fresh], now) and self._places.are_same():
                return True
            fits = self._rebind(self._fresh, items)
            self._places = Places([bound.value for bound in self._fresh])
            return fits
        whole = items.whole()
        if whole.paths != self._layout.paths:
            return False
        if any(
            isinstance(value, torch.Tensor) != (key in self._bound) for key, value in whole.values.items()
        ):
            return False
        fits = self._rebind(self._bound.values(), whole)
        self._follow(items)
        return fits

    def _rebind(self, bound: Iterable[_Bound], items: Items) -> bool:
        for one in bound:
            before = one.moved
            if not one.rebind(items.values[one.key], items.holders.get(one.key)):
                return False
            if before != one.moved <= _RESTLESS:
                self.generation += 1
                if one.moved == _RESTLESS:
                    self._restless.append(one)
        return True

    def archives(self, items: Items) -> Callable[[], list[bytes]]:
        """What makes the archive of each blob, of the values of now; any thread may call it.

        One whose value is as before is the same object. Both raise OutgrownError.
        """
        makers = []
        planner: DefaultSavePlanner | None = None
        for one in self._blobs:
            place = one.place
            if place.item is not None:
                planner = planner or _planner(items)
                makers.append(one.of_tensor(planner.resolve_data(place.item)))
            elif place.key in self._constant:
                makers.append(one.of_constant(self._constant[place.key]))
            else:
                makers.append(one.of(items.values[place.key]))
        return lambda: [make() for make in makers]


class _Blob:
    """The archive of the value that a place had last."""

    def __init__(self, place: BlobPlace) -> None:
        self.place = place
        self._constant: object = None  # the value of ``_archive``, if that is known to be constant
        self._pickled: bytes | None = None  # of a plain value
        self._archive = b""
        self._plain: PlainBlobs | None = None

    def doubt(self) -> None:
        """Its value may have been changed in place."""
        self._constant = None

    def of_constant(self, value: object) -> Maker:
        """Of a value that is as it was as long as it is the same object."""
        if value is not self._constant or not self._archive:
            self.of(value)()
            self._constant = value
        return self._made

    def of_tensor(self, value: object) -> Maker:
        """Of one that only DCP's planner knows how to write."""
        self._archive, self._pickled = blob(value, self.place.room), None
        return self._made

    def of(self, value: object) -> Maker:
        """Of any value."""
        if isinstance(value, Deferred):
            return functools.partial(self._of_deferred, value)
        if not is_plain(value):
            return self.of_tensor(value)
        data = pickled(value)
        if data == self._pickled:
            return self._made
        if self._plain is None:
            self._archive, self._pickled = self._first_of_plain(value, data), data
            return self._made
        plain = self._plain
        plain.check(data)

        def make() -> bytes:
            self._archive, self._pickled = plain.archive(data), data
            return self._archive

        return make

    def _of_deferred(self, value: Deferred) -> bytes:
        return self.of(value.value())()

    def _made(self) -> bytes:
        return self._archive

    def _first_of_plain(self, value: object, data: bytes) -> bytes:
        archive = blob(value, self.place.room)
        # where this torch lays archives out in another way, it is as slow as ever
        with contextlib.suppress(ValueError):
            self._plain = PlainBlobs(self.place.room, archive, data)
        return archive


def _planner(items: Items) -> DefaultSavePlanner:
    """Who knows how to write what only DCP does."""
    planner = DefaultSavePlanner()
    planner.state_dict = items.whole().values
    return planner


def _are(known: Sequence[object], present: Sequence[object]) -> bool:
    return len(known) == len(present) and all(map(operator.is_, known, present))
