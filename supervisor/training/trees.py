"""A state of any shape, parted into its tensors and a skeleton that says where they were.

The skeleton is the same tree of dicts, lists and tuples with a *marker* (a small dict) in each tensor's place. It is built
of plain Python, so that it loads in a process without everstep. A tree without tensors is its own skeleton.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

MARK: Final = "__everstep_tensor__"
BOX: Final = "__everstep_box__"  # around a tensor that is a whole tree, and is pickled


def split(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The skeleton of ``tree``, and its tensors by name (the path to each, joined with dots).

    Parts without tensors are shared with ``tree``, not copied. Tensors that DCP cannot store as such (sparse, quantized,
    subclasses) and those inside objects of other classes stay where they are and are pickled with the skeleton; one that is
    all of ``tree``, in a box.
    """
    tensors: dict[str, torch.Tensor] = {}

    def name_of(path: tuple[str, ...]) -> str:
        name, number = ".".join(path) or "tensor", 1
        while name in tensors:  # {1: a, "1": b}
            number += 1
            name = f"{'.'.join(path)}~{number}"
        return name

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if is_storable(value):
            name = name_of(path)
            tensors[name] = value
            return _marker(name, value)
        if type(value) in (dict, OrderedDict):
            parts = {key: walk(part, (*path, str(key))) for key, part in value.items()}
            return value if all(parts[key] is value[key] for key in value) else type(value)(parts)
        if type(value) is list or isinstance(value, tuple):
            members = [walk(part, (*path, str(index))) for index, part in enumerate(value)]
            if all(new is old for new, old in zip(members, value, strict=True)):
                return value
            if hasattr(value, "_fields"):  # a namedtuple
                return type(value)(*members)
            return type(value)(members)
        return value

    skeleton = walk(tree, ())
    return {BOX: skeleton} if isinstance(skeleton, torch.Tensor) else skeleton, tensors


def join(skeleton: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree again."""
    return _replace(skeleton, lambda marker: tensors[marker[MARK]])


def markers(skeleton: Any) -> list[dict[str, Any]]:
    """Every marker in a skeleton."""
    found: list[dict[str, Any]] = []
    _replace(skeleton, found.append)
    return found


def is_box(value: object) -> bool:
    """Whether it is a skeleton that holds a whole tensor."""
    return type(value) is dict and BOX in value


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether its data lie in memory, an element beside the other, so that they can be copied from there and back."""
    if is_storable(tensor):
        return True
    wraps = hasattr(type(tensor), "__tensor_flatten__")
    return tensor.layout == torch.strided and not tensor.is_quantized and not wraps


def is_storable(value: object) -> bool:
    """Whether ``value`` is a tensor that DCP stores and loads as it is."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter, DTensor)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
    )


def placements_of(marker: Mapping[str, Any]) -> list[Placement] | None:
    """Those of a DTensor's marker; None for a plain tensor's, and when they are more than shards and replicas."""
    recorded = marker.get("placements")
    if not recorded:
        return None
    return [Shard(dim) if kind == "shard" else Replicate() for kind, dim in recorded]


def is_like(value: DTensor, parameter: torch.Tensor | None) -> bool:
    """Whether both are laid out over the ranks alike."""
    return (
        isinstance(parameter, DTensor)
        and value.shape == parameter.shape
        and value.placements == parameter.placements
        and value.device_mesh == parameter.device_mesh
    )


def exact(loaded: Any, present: Any) -> Any:
    """``present``, but where ``load_state_dict`` cast a tensor to its parameter's dtype, the tensor as it was saved."""
    if isinstance(loaded, torch.Tensor) and isinstance(present, torch.Tensor):
        return present if present.dtype == loaded.dtype else loaded.to(present.device)
    if isinstance(loaded, dict) and isinstance(present, dict):
        return {key: exact(loaded[key], value) if key in loaded else value for key, value in present.items()}
    if isinstance(loaded, list) and isinstance(present, list) and len(loaded) == len(present):
        return [exact(old, new) for old, new in zip(loaded, present, strict=True)]
    return present


def in_place(loaded: Any, former: Any) -> Any:
    """``former`` filled with ``loaded`` if both are tensors alike (others may hold it: a learning rate), else ``loaded``."""
    tensors = isinstance(loaded, torch.Tensor) and isinstance(former, torch.Tensor)
    if not tensors or loaded.shape != former.shape or loaded.dtype != former.dtype or loaded is former:
        return loaded
    with torch.no_grad():
        former.copy_(loaded)
    return former


def _marker(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    marker: dict[str, Any] = {MARK: name}
    if tensor.device.type != "cpu":
        marker["device"] = tensor.device.type
    if isinstance(tensor, DTensor):
        kinds = [
            ("shard", p.dim) if type(p) is Shard else ("replicate", 0) if p.is_replicate() else None
            for p in tensor.placements
        ]
        marker["placements"] = None if None in kinds else kinds
    return marker


def _replace(value: Any, of_marker: Callable[[dict[str, Any]], Any]) -> Any:
    if type(value) is dict and MARK in value:
        return of_marker(value)
    if is_box(value):
        return value[BOX]
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _replace(part, of_marker)) for key, part in value.items())
    if type(value) is list:
        return [_replace(part, of_marker) for part in value]
    if isinstance(value, tuple):
        members = [_replace(part, of_marker) for part in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    return value
