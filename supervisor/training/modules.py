"""Modules: what they are called in a state dict, who owns each tensor, and their part of a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from supervisor.errors import UsageError
from supervisor.training import memory, trees
from supervisor.training.items import Items, Owner, Path, mesh_owner
from supervisor.training.moves import counters_of, versions
from supervisor.training.reader import Mismatch, Stored

_CHECKPOINT_WRAPPED = "_checkpoint_wrapped_module"  # activation checkpointing's wrapper, invisible in names


@dataclass(frozen=True)
class Held:
    """A tensor of a module, and the DistributedDataParallel that it is in, if any."""

    name: str
    tensor: torch.Tensor
    is_parameter: bool
    ddp: DistributedDataParallel | None
    name_in_ddp: str


def check_module(name: str, module: nn.Module) -> None:
    """Refuse, by name, what cannot be saved. Raises UsageError."""
    if any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
        raise UsageError(
            f"{name!r} is wrapped by FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2) instead"
        )
    for key, parameter in module.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"parameter {key!r} of {name!r} is on the meta device: materialise it before the Session"
            )


def held_by(module: nn.Module) -> Iterator[Held]:
    """Every parameter and buffer by the name that stock DCP gives it, tied ones under each of their names.

    DCP drops what wrappers (DistributedDataParallel, torch.compile, activation checkpointing) add to the names, and has
    FSDP2 shard again what a forward without a backward left in one piece.
    """
    for child in sharded_in(module):
        child.reshard()
    yield from _walk(module, "", None, "")


def sharded_in(module: nn.Module) -> Iterator[FSDPModule]:
    """The modules that FSDP2 shards."""
    if not FSDPModule.__subclasses__():  # of which each that is sharded becomes an instance
        return
    for child in module.modules():
        if isinstance(child, FSDPModule):
            yield child


def owner(held: Held, rank: int) -> Owner:
    """Who writes it; the rules are in ``items``."""
    if isinstance(held.tensor, DTensor):
        return mesh_owner(held.tensor)
    ddp = held.ddp
    if ddp is None or held.name_in_ddp in ddp.parameters_to_ignore:
        return Owner(rank)
    if held.is_parameter or ddp.broadcast_buffers:
        ranks = dist.get_process_group_ranks(ddp.process_group)
        return Owner(min(ranks), holders=frozenset(ranks))
    return Owner(rank)


class ModulePart:
    """A module. Its tensors are saved from where they are, and loaded in place."""

    def __init__(self, name: str, module: nn.Module, rank: int) -> None:
        check_module(name, module)
        self.name = name
        self.module = module
        self._rank = rank
        self._targets: dict[str, Any] = {}  # by fully qualified name
        self._memory: memory.Memory | None = None
        self._keys: dict[str, str] = {}  # stored key by fully qualified name
        self._frozen = _frozen(module)
        self._named: list[tuple[str, torch.Tensor]] = []
        #: counts up when tensors are called otherwise, or others are; what was gathered last tells
        self.generation = 0

    def gather(self, items: Items) -> None:
        """Contribute every entry of the state dict."""
        if self._memory is not None and self._memory.recall(items):
            return
        held = {held.name: held for held in held_by(self.module)}
        self._follow_names([(one.name, one.tensor) for one in held.values()])
        owners = {name: owner(one, self._rank) for name, one in held.items()}
        frozen = {fqn for fqn, count in _frozen(self.module).items() if self._frozen.get(fqn) == count}
        own = items.part()
        for fqn, value in get_model_state_dict(self.module).items():
            own.add(
                (self.name, fqn),
                _stored(value),
                self._owner(owners, fqn, value),
                constant=fqn in frozen and _stored(value) is value,
                holder=held[fqn].tensor if fqn in held else None,
            )
        items.keep(own)
        plain = all(isinstance(value, torch.Tensor) for value in own.values.values())
        self._memory = memory.of_module(self.module, own) if plain else None

    def _follow_names(self, named: list[tuple[str, torch.Tensor]]) -> None:
        before = self._named
        same = len(named) == len(before) and all(
            name == known and tensor is present
            for (name, tensor), (known, present) in zip(named, before, strict=True)
        )
        if not same:
            self._named = named
            self.generation += 1

    def prepare(self, stored: Stored, mismatch: Mismatch) -> dict[str, torch.Tensor]:
        """The tensors to load into, by stored key."""
        owners = {held.name: owner(held, self._rank) for held in held_by(self.module)}
        self._targets = dict(get_model_state_dict(self.module))
        self._keys.clear()
        tensors: dict[str, torch.Tensor] = {}
        for fqn, value in self._targets.items():
            path: Path = (self.name, fqn)
            key = stored.find(path, self._owner(owners, fqn, value).rank)
            if key is None:
                mismatch.missing.append(f"{self.name}.{fqn}")
            elif mismatch.fits(f"{self.name}.{fqn}", stored.metadata_of(key), kept := _stored(value)):
                self._keys[fqn] = key
                if isinstance(kept, torch.Tensor):
                    tensors[key] = kept.detach()
        for _, path, _ in stored.entries((self.name,)):
            if path[1] not in self._targets:
                mismatch.unexpected.append(f"{self.name}.{path[1]}")
        return tensors

    def apply(self, stored: Stored) -> None:
        """The tensors are loaded: hand over the rest, and let the module's own load hooks run."""
        state = self._targets
        rest = {
            fqn: self._keys[fqn]
            for fqn, value in state.items()
            if not isinstance(_stored(value), torch.Tensor)
        }
        objects = stored.objects(rest.values())
        for fqn, key in rest.items():
            state[fqn] = trees.join(objects[key], {}) if trees.is_box(objects[key]) else objects[key]
        set_model_state_dict(self.module, state)
        self._targets = {}
        self._frozen = _frozen(self.module)

    def _owner(self, owners: dict[str, Owner], fqn: str, value: object) -> Owner:
        if fqn in owners:
            return owners[fqn]
        return mesh_owner(value) if isinstance(value, DTensor) else Owner(self._rank)


def _stored(value: Any) -> Any:
    """What is stored for an entry of a state dict: itself; for a tensor that is no plain memory (sparse, quantized), a box."""
    if isinstance(value, torch.Tensor) and not trees.has_memory(value):
        return trees.split(value)[0]
    return value


def _frozen(module: nn.Module) -> dict[str, list[int]]:
    """The parameters that are not trained, and how often each was written. (Averages of others are not trained, too.)"""
    return {
        held.name: versions(counters_of(held.tensor))
        for held in held_by(module)
        if held.is_parameter and not held.tensor.requires_grad and not held.tensor.is_inference()
    }


def _walk(module: nn.Module, prefix: str, ddp: DistributedDataParallel | None, in_ddp: str) -> Iterator[Held]:
    if isinstance(module, DistributedDataParallel):
        yield from _walk(module.module, prefix, module, "")
        return
    for wrapped in ("_orig_mod", _CHECKPOINT_WRAPPED):
        if isinstance(inner := module._modules.get(wrapped), nn.Module):
            yield from _walk(inner, prefix, ddp, in_ddp)
            return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Held(prefix + name, parameter, True, ddp, in_ddp + name)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield Held(prefix + name, buffer, False, ddp, in_ddp + name)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", ddp, f"{in_ddp}{name}.")
