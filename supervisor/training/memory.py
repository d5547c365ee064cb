"""Gathering again what was gathered before, without asking every module and optimizer for a new state dict.

A state dict of thousands of tensors takes tens of milliseconds to build, and says the same as the one before: which tensor
objects there are. So what a part gathered is kept, beside the containers it came from; as long as these hold the very
same objects, with their data in the same place, it holds. Objects with hooks or methods of their own in this matter are
asked every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from supervisor.training.items import Items
from supervisor.training.moves import local_of

_ASKED = ("state_dict", "_save_to_state_dict", "get_extra_state")


class Places:
    """Where tensors lie in memory; holds on to them, so that no other tensor can have their ``id``."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = [local_of(tensor) for tensor in tensors]
        pairs = zip(tensors, self._tensors, strict=True)
        self._distributed = [(held, local) for held, local in pairs if held is not local]
        self._places = self._look()

    def _look(self) -> tuple[list[int], list[Any], list[Any]]:
        tensors = self._tensors
        return (
            [tensor.data_ptr() for tensor in tensors],
            [tensor.stride() for tensor in tensors],
            [tensor.shape for tensor in tensors],
        )

    def are_same(self) -> bool:
        """Whether all of them are where they were, and of the same shape."""
        if any(local_of(held) is not local for held, local in self._distributed):
            return False
        return self._look() == self._places


class Memory:
    """Items, and the containers that they were found in."""

    def __init__(self, items: Items, containers: list[dict[Any, Any]], tensors: list[torch.Tensor]) -> None:
        self._items = items
        self._containers = [(container, _ids(container)) for container in containers]
        self._kept = [list(container.values()) for container in containers]
        self._places = Places(tensors)

    def recall(self, items: Items) -> bool:
        """Contribute what is remembered, if that still holds."""
        if any(_ids(container) != ids for container, ids in self._containers) or not self._places.are_same():
            return False
        items.merge(self._items)
        return True


def of_module(module: nn.Module, items: Items) -> Memory | None:
    """What ``items`` says of ``module`` and all below; None when it must be asked every time."""
    containers: list[dict[Any, Any]] = []
    for part in module.modules():
        kind: Any = type(part)
        if any(
            name in part.__dict__ or getattr(kind, name) is not getattr(nn.Module, name) for name in _ASKED
        ):
            return None
        hooks = [*part._state_dict_hooks.values()]
        hooks += [hook for hook in part._state_dict_pre_hooks.values() if not _is_of_fsdp(hook)]
        if hooks:
            return None
        containers += [part._parameters, part._buffers, part._modules]
    return Memory(items, containers, [*module.parameters(), *module.buffers()])


def of_optimizer(optimizer: Optimizer, items: Items) -> Memory | None:
    """What ``items`` says of the state of ``optimizer``; None when it must be asked every time."""
    kind: Any = type(optimizer)
    own: Any = optimizer
    if kind.state_dict is not Optimizer.state_dict or "state_dict" in own.__dict__:
        return None
    if own._optimizer_state_dict_pre_hooks or own._optimizer_state_dict_post_hooks:
        return None
    if not optimizer.state or not all(isinstance(value, torch.Tensor) for value in items.values.values()):
        return None
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    tensors = [value for state in states for value in state.values()]
    if len(states) != len(optimizer.state) or not all(isinstance(value, torch.Tensor) for value in tensors):
        return None
    groups = [dict(enumerate(group["params"])) for group in optimizer.param_groups]
    return OptimizerMemory(optimizer, items, [optimizer.state, *states], groups)


class OptimizerMemory(Memory):
    """Also: which parameters there are."""

    def __init__(
        self,
        optimizer: Optimizer,
        items: Items,
        containers: list[dict[Any, Any]],
        groups: list[dict[int, Any]],
    ) -> None:
        super().__init__(items, containers, [])  # the items are the tensors in use
        self._optimizer = optimizer
        self._groups = [_ids(group) for group in groups]

    def recall(self, items: Items) -> bool:
        """As above."""
        groups = [tuple(map(id, group["params"])) for group in self._optimizer.param_groups]
        return groups == self._groups and super().recall(items)


def _ids(container: dict[Any, Any]) -> tuple[int, ...]:
    return tuple(map(id, container.values()))


def _is_of_fsdp(hook: Any) -> bool:
    """FSDP's brings a module into its sharded form, in which the parameters are other objects."""
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")
