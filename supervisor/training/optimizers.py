"""Optimizers: their state by parameter name, in the layout of DCP's optimizer state dicts.

``optimizer.state_dict()`` numbers the parameters; here each number becomes the parameter's name in the modules of the
Session, so that a checkpoint fits another world size and stock tools can read it. DCP's own ``get_optimizer_state_dict``
is never used: for an optimizer that has not stepped it calls ``step()``, which changes weights and step counters.

An optimizer may span several modules (its names then begin with the module's keyword), several optimizers may share
one, and one that has not stepped has no state, which is saved and restored as such. The state of a replicated parameter
is replicated and that of a sharded one is sharded, but for plain tensors other than ``step``, which each rank keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor
from torch.optim import Optimizer

from supervisor.errors import UsageError
from supervisor.training import memory, modules, trees
from supervisor.training.items import Items, Owner, Path
from supervisor.training.reader import Mismatch, Stored

Named = tuple[str, Owner]


class _Names:
    """What the tensors of some modules are called, as of their last gathering."""

    def __init__(self, parts: Sequence[modules.ModulePart]) -> None:
        self._parts = parts
        self._generations = [part.generation for part in parts]

    def are_same(self) -> bool:
        """Whether they still are."""
        return [part.generation for part in self._parts] == self._generations


class OptimizerPart:
    """A ``torch.optim.Optimizer``, or a ZeroRedundancyOptimizer by way of the local one inside it."""

    def __init__(
        self, name: str, optimizer: Optimizer, given: Sequence[modules.ModulePart], rank: int
    ) -> None:
        """``given`` are gathered before it."""
        self.name = name
        self.optimizer = optimizer
        self._given = list(given)
        self._rank = rank
        self._local = optimizer
        self._partitioned = False
        self._memory: memory.Memory | None = None
        self._groups_owner = Owner(rank)
        zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
        if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
            if getattr(optimizer, "_overlap_with_ddp", False):
                raise UsageError(
                    f"{name!r} is a ZeroRedundancyOptimizer with overlap_with_ddp, which is not supported"
                )
            self._local = optimizer.optim
            self._partitioned = True
        self._names = self._name_all()
        self._states: dict[int | str, Any] = {}  # being loaded, by number
        self._groups: list[dict[str, Any]] = []
        self._targets: dict[str, torch.Tensor] = {}  # by stored key

    # ------------------------------------------------------------------ names

    def _name_all(self) -> dict[int, Named]:
        """Name and owner of every parameter by ``id``. Raises UsageError for one that is in no module."""
        known: dict[str, dict[int, Named]] = {}
        for part in self._given:
            table = known.setdefault(part.name, {})
            for held in modules.held_by(part.module):
                if held.is_parameter:
                    table.setdefault(id(held.tensor), (held.name, modules.owner(held, self._rank)))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for table in known.values():
            if all(id(parameter) in table for parameter in parameters):
                return table
        merged: dict[int, Named] = {}
        for keyword, table in known.items():
            for identity, (fqn, owner) in table.items():
                merged.setdefault(identity, (f"{keyword}.{fqn}", owner))
        for number, parameter in enumerate(parameters):
            if id(parameter) not in merged:
                raise UsageError(
                    f"parameter {number} (shape {list(parameter.shape)}) of {self.name!r} is in no module of this Session: "
                    "give the module that holds it as well"
                )
        return merged

    def _named(self, parameter: torch.Tensor) -> Named:
        if id(parameter) not in self._names:  # add_param_group
            self._names = self._name_all()
        return self._names[id(parameter)]

    def _numbered(self) -> list[torch.Tensor]:
        """The parameters in the order in which ``state_dict`` numbers them."""
        parameters = (p for group in self._local.param_groups for p in group["params"])
        return list({id(parameter): parameter for parameter in parameters}.values())

    def _owner(self, parameter: torch.Tensor, key: str, value: object) -> Owner:
        owner = self._named(parameter)[1]
        if self._partitioned:
            return Owner(0, everyone=True)  # each parameter's state is on one rank
        if not owner.everyone or isinstance(value, DTensor):
            return owner
        plain_tensor = isinstance(value, torch.Tensor) and key != "step"
        return Owner(self._rank) if plain_tensor else replace(owner, everyone=False)

    def _group_owner(self) -> Owner:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        owners = {self._named(parameter)[1] for parameter in parameters}
        ranks = {owner.rank for owner in owners}
        if len(ranks) != 1:
            return Owner(self._rank)
        return Owner(ranks.pop(), holders=frozenset.intersection(*(owner.holders for owner in owners)))

    # ------------------------------------------------------------------ saving

    def gather(self, items: Items) -> None:
        """Contribute the state of every parameter that has some, and the groups."""
        if self._memory is None or not self._memory.recall(items):
            own = items.part()
            self._names = self._name_all()
            self._gather_states(own)
            plain = all(isinstance(value, torch.Tensor) for value in own.values.values())
            self._groups_owner = self._group_owner()
            for index, group in enumerate(self.optimizer.param_groups):
                names = [self._named(parameter)[0] for parameter in group["params"]]
                own.add((self.name, "param_groups", index, "params"), names, self._groups_owner)
            items.keep(own)
            self._memory = (
                memory.of_optimizer(self._local, own, self.optimizer, _Names(self._given)) if plain else None
            )
        for index, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    self._add(items, (self.name, "param_groups", index, key), value, self._groups_owner, None)

    def _gather_states(self, items: Items) -> None:
        parameters = self._numbered()
        states = self._local.state_dict()["state"]
        for number, parameter in enumerate(parameters):
            fqn, owner = self._named(parameter)
            state = states.get(number, {})
            for key, value in state.items():
                self._add(
                    items,
                    (self.name, "state", fqn, key),
                    value,
                    self._owner(parameter, key, value),
                    parameter,
                )
            if not state and owner.rank != 0 and not owner.everyone and not self._partitioned:
                items.add((self.name, "state", fqn), {}, owner)  # else it would be given rank 0's
        for key in states.keys() - set(range(len(parameters))):
            self._add(items, (self.name, "state", f"@{key}"), states[key], Owner(self._rank), None)

    def _add(
        self, items: Items, path: Path, value: Any, owner: Owner, parameter: torch.Tensor | None
    ) -> None:
        if trees.is_storable(value) and (not isinstance(value, DTensor) or trees.is_like(value, parameter)):
            items.add(path, value, owner)
            return
        skeleton, tensors = trees.split(value)
        items.add(path, skeleton, owner)
        for name, tensor in tensors.items():
            items.add((*path[:-1], f"{path[-1]}.{name}"), tensor, owner)

    # ------------------------------------------------------------------ loading

    def prepare(self, stored: Stored, mismatch: Mismatch) -> dict[str, torch.Tensor]:
        """The tensors to load into, by stored key. Reads the byte items."""
        self._targets, self._states = {}, {}
        if self.name not in stored.names():
            mismatch.missing.append(self.name)
            return {}
        self._groups = self._prepare_groups(stored, mismatch)
        table: dict[str, dict[int, dict[Path, str]]] = {}  # name → owner → path → key
        for owner, path, key in stored.entries((self.name, "state")):
            table.setdefault(str(path[2]), {}).setdefault(owner, {})[path] = key
        known = {self._named(p)[0] for group in self.optimizer.param_groups for p in group["params"]}
        for fqn in table.keys() - known:
            if not fqn.startswith("@"):
                mismatch.unexpected.append(f"{self.name}.state.{fqn}")
        chosen = {number: self._choose(table, parameter) for number, parameter in enumerate(self._numbered())}
        objects = stored.objects(
            key for keys in chosen.values() for key in keys.values() if stored.is_object(key)
        )
        for number, parameter in enumerate(self._numbered()):
            if stored.resharded and isinstance(parameter, DTensor):
                mismatch.different += self._of_shards(stored, chosen[number], parameter)
            if state := self._rebuild(stored, chosen[number], objects, parameter):
                self._states[number] = state
        for fqn in table:
            if fqn.startswith("@"):
                keys = table[fqn].get(self._rank) or table[fqn][min(table[fqn])]
                values = stored.objects(key for key in keys.values() if stored.is_object(key))
                flat = {(*path[:2], "", *path[2:]): key for path, key in keys.items()}
                self._states[fqn[1:]] = self._rebuild(stored, flat, values, None)[fqn]
        return self._targets

    def apply(self, stored: Stored) -> None:
        """Give the optimizer what was loaded, in the dtypes it was saved in."""
        numbers = {id(parameter): number for number, parameter in enumerate(self._numbered())}
        groups = [
            {**loaded, "params": [numbers[id(parameter)] for parameter in group["params"]]}
            for loaded, group in zip(self._groups, self._local.param_groups, strict=True)
        ]
        former = [dict(group) for group in self._local.param_groups]
        self._local.load_state_dict({"state": self._states, "param_groups": groups})
        for group, before in zip(self._local.param_groups, former, strict=True):
            group.update({key: trees.in_place(value, before.get(key)) for key, value in group.items()})
        for parameter in self._numbered():
            present = self._local.state.get(parameter)
            for key, value in self._states.get(numbers[id(parameter)], {}).items():
                if present is not None and key in present:
                    present[key] = trees.exact(value, present[key])
        if self._partitioned:
            for group, loaded in zip(self.optimizer.param_groups, self._groups, strict=True):
                group.update({k: trees.in_place(v, group.get(k)) for k, v in loaded.items() if k != "params"})
        self._targets, self._states, self._groups = {}, {}, []

    def _of_shards(self, stored: Stored, chosen: Mapping[Path, str], parameter: DTensor) -> list[str]:
        """The plain tensors that an optimizer kept for its shard of a parameter: other shards cannot have them."""
        return [
            f"{self.name}.state.{path[2]}.{path[3]} is a plain tensor per shard, which other shards cannot take over"
            for path, key in chosen.items()
            if isinstance(metadata := stored.metadata_of(key), TensorStorageMetadata)
            if len(path) == 4 and path[3] != "step" and metadata.size and metadata.size != parameter.shape
            if stored.find((self.name, "state", str(path[2]), str(path[3]).split(".")[0]), 0) == key
        ]

    def _choose(
        self, table: Mapping[str, dict[int, dict[Path, str]]], parameter: torch.Tensor
    ) -> dict[Path, str]:
        """The stored entries that make up the state of a parameter on this rank."""
        fqn, owner = self._named(parameter)
        by_owner = table.get(fqn, {})
        if not by_owner:
            return {}
        source = next((rank for rank in (owner.rank, 0) if rank in by_owner), min(by_owner))
        if owner.everyone and self._rank in by_owner:  # its own plain tensors, over what all share
            return {**by_owner[source], **by_owner[self._rank]}
        return by_owner[source]

    def _prepare_groups(self, stored: Stored, mismatch: Mismatch) -> list[dict[str, Any]]:
        own = self._group_owner().rank
        entries = list(stored.entries((self.name, "param_groups")))
        owners = {owner for owner, _, _ in entries}
        source = next((rank for rank in (own, 0) if rank in owners), min(owners, default=0))
        keys: dict[int, dict[Path, str]] = {}
        for owner, path, key in entries:
            if owner == source:
                keys.setdefault(int(path[2]), {})[path] = key
        present = self.optimizer.param_groups
        if len(keys) != len(present):
            mismatch.different.append(f"{self.name} has {len(keys)} param_groups, here {len(present)}")
            return []
        every = [key for group in keys.values() for key in group.values() if stored.is_object(key)]
        objects = stored.objects(every)
        groups = [self._rebuild(stored, keys[index], objects, None) for index in range(len(present))]
        for index, group in enumerate(groups):
            names = [self._named(parameter)[0] for parameter in present[index]["params"]]
            label = f"{self.name}.param_groups.{index}"
            mismatch.missing += [f"{label}: {fqn}" for fqn in names if fqn not in group["params"]]
            mismatch.unexpected += [f"{label}: {fqn}" for fqn in group["params"] if fqn not in names]
        return groups

    def _rebuild(
        self,
        stored: Stored,
        entries: Mapping[Path, str],
        objects: Mapping[str, Any],
        parameter: torch.Tensor | None,
    ) -> dict[str, Any]:
        """A dict of values from its entries ``(name, section, id, key)``; its tensors become targets."""
        keys = {str(path[3]): key for path, key in entries.items() if len(path) > 3}
        values: dict[str, Any] = {}
        inside: set[str] = set()
        for name, key in keys.items():
            if stored.is_object(key):
                tensors = {}
                for marker in trees.markers(objects[key]):
                    part = f"{name}.{marker[trees.MARK]}"
                    inside.add(part)
                    target = self._target(stored, keys[part], parameter, marker)
                    tensors[marker[trees.MARK]] = target
                values[name] = trees.join(objects[key], tensors)
        for name, key in keys.items():
            if name not in inside and not stored.is_object(key):
                values[name] = self._target(stored, key, None if name == "step" else parameter, None)
        return values

    def _target(
        self, stored: Stored, key: str, parameter: torch.Tensor | None, marker: Mapping[str, Any] | None
    ) -> torch.Tensor:
        metadata = stored.metadata_of(key)
        assert isinstance(metadata, TensorStorageMetadata)
        dtype, size = metadata.properties.dtype, metadata.size
        placements = trees.placements_of(marker) if marker is not None else None
        target: torch.Tensor
        if isinstance(parameter, DTensor) and placements is not None:
            target = empty_dtensor(
                size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements
            )
        elif (
            parameter is not None
            and parameter.shape == size
            and (marker is None or "placements" not in marker)
        ):
            target = torch.empty_like(parameter.detach(), dtype=dtype, requires_grad=False)
        else:
            on_cpu = (
                parameter is None
                or (marker is None and not size)
                or (marker is not None and "device" not in marker)
            )
            device = "cpu" if on_cpu or parameter is None else parameter.device
            target = torch.empty(size, dtype=dtype, device=device)
        self._targets[key] = target
        return target
