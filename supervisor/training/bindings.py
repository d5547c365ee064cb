"""What of the training goes where: the items of this rank, bound to the places of a layout."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from supervisor.training.items import Items
from supervisor.training.layout import blob
from supervisor.training.memory import Places
from supervisor.training.moves import Source, local_of
from supervisor.training.planning import BlobPlace, Layout, TensorPlace, signature

_SCALARS: Final = frozenset({bool, int, float, complex, str, bytes, type(None)})


class _Bound:
    """A tensor item, and its place if this rank writes it."""

    __slots__ = ("key", "place", "signature", "source", "value")

    def __init__(self, key: str, value: torch.Tensor, place: TensorPlace | None, planned: object) -> None:
        self.key = key
        self.value = value
        self.place = place
        self.signature = planned
        self.source: Source | None = None if place is None else Source(local_of(value))


class Bindings:
    """Follows the values of a layout's items from snapshot to snapshot.

    ``generation`` counts up when tensors have moved in memory: what was prepared for copying them is void then.
    """

    def __init__(self, layout: Layout, items: Items) -> None:
        self.generation = 0
        self._layout = layout
        places = {place.key: place for place in layout.tensors}
        self._bound = [
            _Bound(key, items.values[key], places.get(key), planned)
            for key, planned in layout.signatures.items()
        ]
        self._others = [key for key in layout.paths if key not in layout.signatures]
        self._values = [bound.value for bound in self._bound]
        self._places = Places(self._placed)
        self._blobs: dict[int, tuple[object, bytes]] = {}  # by place: print of the value, its archive

    @property
    def sources(self) -> list[tuple[TensorPlace, Source]]:
        """Every tensor that this rank writes, and where."""
        return [(b.place, b.source) for b in self._bound if b.place is not None and b.source is not None]

    def fit(self, items: Items) -> bool:
        """Take over new values; whether the layout still fits them."""
        values = items.values
        if items.paths != self._layout.paths:
            return False
        if any(isinstance(values[key], torch.Tensor) for key in self._others):
            return False
        now = [values[key] for key in self._layout.signatures]
        if all(map(operator.is_, now, self._values)) and self._places.are_same():
            return True
        fits = self._rebind(values)
        self._values = now
        self._places = Places(self._placed)
        return fits

    @property
    def _placed(self) -> list[torch.Tensor]:
        return [bound.value for bound in self._bound if bound.place is not None]

    def _rebind(self, values: dict[str, Any]) -> bool:
        for bound in self._bound:
            value = values[bound.key]
            if value is not bound.value:
                if not isinstance(value, torch.Tensor) or signature(value) != bound.signature:
                    return False
                bound.value = value
            source = bound.source
            if source is not None:
                local = local_of(value)
                if not source.is_same(local):
                    place = bound.place
                    if place is None or tuple(local.shape) != place.shape or local.dtype != place.dtype:
                        return False
                    bound.source = Source(local)
                    self.generation += 1
        return True

    def archives(self, items: Items) -> list[bytes]:
        """The archive of each blob. One whose value is as before is the same object. Raises OutgrownError."""
        return [self._archive(place, number, items) for number, place in enumerate(self._layout.blobs)]

    def _archive(self, place: BlobPlace, number: int, items: Items) -> bytes:
        value = _resolved(items, place.item) if place.item is not None else items.values[place.key]
        seen = _print(value)
        known = self._blobs.get(number)
        if known is not None and seen is not None and known[0] == seen:
            return known[1]
        data = blob(value, place.room)
        self._blobs[number] = (seen, data)
        return data


def _resolved(items: Items, item: WriteItem) -> Any:
    planner = DefaultSavePlanner()
    planner.state_dict = items.values
    return planner.resolve_data(item)


def _print(value: object) -> object:
    """Something that is equal only for equal values of plain types; None where that cannot be said cheaply."""
    return (type(value), repr(value)) if _is_plain(value) else None


def _is_plain(value: object) -> bool:
    if type(value) in _SCALARS:
        return True
    if type(value) is list or type(value) is tuple:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return False
