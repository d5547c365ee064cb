"""Everything else that has ``state_dict`` and ``load_state_dict``: its state is a tree, kept per rank.

It comes back in the shape in which it was saved, whatever shape the object's present state has (a data loader's differs
before and during an iteration). A checkpoint of another world size gives rank 0's state to the ranks it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from supervisor.training import trees
from supervisor.training.items import Items, Owner, Path, mesh_owner
from supervisor.training.reader import Mismatch, Stored


class Stateful(Protocol):
    """What torch calls Stateful."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take it back."""
        ...


class TreePart:
    """A state that is a tree. ``get`` and ``put`` move it out of and into the object."""

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], object], rank: int) -> None:
        self.name = name
        self._get = get
        self._put = put
        self._rank = rank
        self._loaded: Any = None

    def gather(self, items: Items) -> None:
        """Contribute the skeleton and the tensors."""
        skeleton, tensors = trees.split(self._get())
        items.add((self.name,), skeleton, Owner(self._rank))
        for name, tensor in tensors.items():
            items.add(self._path(name), tensor, self._owner(tensor))

    def prepare(self, stored: Stored, mismatch: Mismatch) -> dict[str, torch.Tensor]:
        """The tensors to load into, by stored key. Reads the skeleton."""
        key = stored.find((self.name,), self._rank)
        if key is None:
            mismatch.missing.append(self.name)
            return {}
        source = self._rank if stored.owned((self.name,), self._rank) else 0
        skeleton = stored.objects([key])[key]
        targets: dict[str, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        template: Mapping[str, torch.Tensor] | None = None
        found = [
            marker
            for marker in trees.markers(skeleton)
            if stored.find(self._path(marker[trees.MARK]), source)
        ]
        for marker in found:
            name = marker[trees.MARK]
            if "placements" in marker:
                template = trees.split(self._get())[1] if template is None else template
                target = template.get(name)
                if not isinstance(target, DTensor):
                    mismatch.missing.append(f"{self.name}.{name} is a DTensor, here it is none, so it")
                    continue
                stored_key = stored.find(self._path(name), mesh_owner(target).rank)
                target = torch.empty_like(target.detach())
            else:
                stored_key = stored.find(self._path(name), source)
                target = None
            assert stored_key is not None
            metadata = stored.metadata_of(stored_key)
            assert isinstance(metadata, TensorStorageMetadata)
            if target is None:
                device = marker.get("device", "cpu")
                target = torch.empty(metadata.size, dtype=metadata.properties.dtype, device=device)
            elif not mismatch.fits(f"{self.name}.{name}", metadata, target):
                continue
            targets[stored_key] = tensors[name] = target
        is_parted = bool(found) or trees.is_box(skeleton)
        self._loaded = trees.join(skeleton, tensors) if is_parted and len(tensors) == len(found) else skeleton
        return targets

    def apply(self, stored: Stored) -> None:
        """Give the object its state."""
        loaded, self._loaded = self._loaded, None
        self._put(loaded)

    def _path(self, name: str) -> Path:
        # one component: in a nested state dict the skeleton has the place above
        return (f"{self.name}.{name}",)

    def _owner(self, tensor: torch.Tensor) -> Owner:
        return mesh_owner(tensor) if isinstance(tensor, DTensor) else Owner(self._rank)


def differing(stored: Stored, names: list[str]) -> list[str]:
    """Of the trees ``names``, those whose skeletons differ between the ranks that wrote them."""
    differing = []
    for name in names:
        keys = [key for owner in stored.owners if (key := stored.owned((name,), owner)) is not None]
        values = stored.objects(keys)
        if any(repr(values[key]) != repr(values[keys[0]]) for key in keys[1:]):
            differing.append(name)
    return differing
