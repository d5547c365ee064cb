"""Gradients are state, but not saved: a save point waits until none are pending.

A gradient is *spent* once an optimizer has stepped with it, and stays so until something is added to it: the step leaves
its mark on the tensor, with the version it had. What is pending is every gradient that is not zero and not spent: one
that steps accumulate, and one that arrived after the optimizer's last step (a body that steps first, then goes backward).
FSDP2 that does not synchronise keeps what it accumulates beside the parameters; that is looked at, too.

Which parameters count? Those of the Session's optimizers, of optimizers found inside other objects given, and of any
optimizer that has stepped in this process: every ``torch.optim.Optimizer`` tells, whatever it is wrapped in. A parameter that
no optimizer will ever use may carry its gradient for ever, and keeps nothing waiting.

A step inside ``torch.compile`` leaves no marks: there, all gradients are spent in the step in which their optimizer stepped.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping
from itertools import chain, repeat
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from supervisor.training.memory import Containers
from supervisor.training.modules import sharded_in

_grad: Final = operator.attrgetter("grad")
_version: Final = operator.attrgetter("_version")
_UNKNOWN: Final = object()
_SPENT: Final = "_everstep_spent"  # on a gradient: the version with which an optimizer stepped


class Gradients:
    """Watches the optimizers of a Session. ``stepped`` is cleared by the Session after each step."""

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        modules: Mapping[str, nn.Module] | None = None,
        others: Mapping[str, object] | None = None,
    ) -> None:
        self._optimizers = dict(optimizers)
        self._modules = dict(modules or {})
        for name, value in (others or {}).items():
            for found in hidden_in(value):
                if all(found is not known for known in self._optimizers.values()):
                    self._optimizers[name] = found
        self.stepped = [False] * len(self._optimizers)  # by a compiled step
        self.none_stepped = tuple(self.stepped)
        self._index = {id(optimizer): index for index, optimizer in enumerate(self._optimizers.values())}
        #: other optimizers of our parameters; a training may make one for each epoch, or step
        self._strangers: weakref.WeakValueDictionary[int, Optimizer] = weakref.WeakValueDictionary()
        self._sharded: dict[str, _Sharded] = {}
        self._handle = register_optimizer_step_post_hook(self._note)

    def pending(self) -> list[str]:
        """The names of what has gradients that have not been used yet. Looks at every gradient: save points only."""
        names = [
            name
            for (name, optimizer), stepped in zip(self._optimizers.items(), self.stepped, strict=True)
            if not stepped and _any_pending(_gradients_of(optimizer))
        ]
        names += [
            type(optimizer).__name__
            for optimizer in self._strangers.values()
            if _any_pending(_gradients_of(optimizer))
        ]
        names += [
            name
            for name, module in self._modules.items()
            if _any_pending(self._sharded_in(name, module).kept)
        ]
        return list(dict.fromkeys(names))

    def _sharded_in(self, name: str, module: nn.Module) -> _Sharded:
        known = self._sharded.get(name)
        if known is None or not known.is_all:
            known = self._sharded[name] = _Sharded(module)
        return known

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()
        self._strangers.clear()

    def _note(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        index = self._index.get(id(optimizer))
        if torch.compiler.is_compiling():
            if index is not None:
                self.stepped[index] = True
            return
        if index is None and id(optimizer) not in self._strangers and self._is_ours(optimizer):
            self._strangers[id(optimizer)] = optimizer
        gradients = _locals_of(_gradients_of(optimizer))
        for _ in map(setattr, gradients, repeat(_SPENT), map(_version, gradients)):
            pass

    def _is_ours(self, optimizer: Optimizer) -> bool:
        ours = {id(parameter) for module in self._modules.values() for parameter in module.parameters()}
        return any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])


def hidden_in(value: object) -> list[Optimizer]:
    """The optimizers that an object which is none itself holds: a wrapper's, a scheduler's."""
    if isinstance(value, (nn.Module, torch.Generator)):
        return []
    held: Iterable[object] = getattr(value, "__dict__", {}).values()
    return [
        part for part in held if isinstance(part, Optimizer) and hasattr(part, "_optimizer_step_post_hooks")
    ]


def _gradients_of(optimizer: Optimizer) -> list[torch.Tensor]:
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [gradient for gradient in map(_grad, parameters) if gradient is not None]


def _locals_of(tensors: list[torch.Tensor]) -> list[Any]:
    """The objects that hold this rank's parts."""
    if set(map(type, tensors)) <= {torch.Tensor}:
        return tensors
    return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]


class _Sharded:
    """What of a module FSDP2 shards, found once. Private names; a torch without them has nothing to look at."""

    def __init__(self, module: nn.Module) -> None:
        self._graph = Containers([part._modules for part in module.modules()])
        self._groups: list[Any] = []
        for child in sharded_in(module):
            state: Any = child._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            self._groups += [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
        self._parameters = [p for group in self._groups for p in getattr(group, "fsdp_params", ())]
        self._cast = [p for p in self._parameters if getattr(p, "reduce_dtype", _UNKNOWN) is not None]
        self._unsharded: list[Any] = []

    @property
    def is_all(self) -> bool:
        """Whether the module has the same modules in it still."""
        return self._graph.are_same()

    @property
    def kept(self) -> list[torch.Tensor]:
        """What it has accumulated without reducing it: of a group, cast to the dtype it is reduced in, or as it came."""
        kept = chain(
            map(getattr, self._groups, repeat("_partial_reduce_output"), repeat(None)),
            map(getattr, self._cast, repeat("unsharded_accumulated_grad"), repeat(None)),
            map(getattr, self._whole(), repeat("grad"), repeat(None)),
        )
        return [gradient for gradient in kept if gradient is not None]

    def _whole(self) -> list[Any]:
        """The parameters in one piece. Each is made in the first forward that needs it, and is the same ever after."""
        known = self._unsharded
        if not known or getattr(self._parameters[0], "_unsharded_param", None) is not known[0]:
            self._unsharded = known = [getattr(p, "_unsharded_param", None) for p in self._parameters]
            if any(one is None for one in known):
                self._unsharded = []  # until all are there
        return known


def _any_pending(tensors: Iterable[torch.Tensor]) -> bool:
    gradients = _locals_of(list(tensors))
    if list(map(getattr, gradients, repeat(_SPENT), repeat(None))) == list(map(_version, gradients)):
        return False
    return any(getattr(g, _SPENT, None) != g._version and bool((_values_of(g) != 0).any()) for g in gradients)


def _values_of(gradient: torch.Tensor) -> torch.Tensor:
    """What of it can be compared: a sparse one's values (nobody has summed those of the same place up yet)."""
    if gradient.layout is torch.strided:
        return gradient
    return gradient._values() if gradient.layout is torch.sparse_coo else gradient.values()
