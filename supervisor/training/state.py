"""The whole state of a training on one rank: its parts, gathered into items and loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from supervisor.errors import CheckpointError, UsageError
from supervisor.training import rng
from supervisor.training.ddp import Buckets
from supervisor.training.gradients import hidden_in
from supervisor.training.items import OWN, STATE, Deferred, Items, Owner, settled
from supervisor.training.loaders import LoaderState, is_stateful_loader
from supervisor.training.modules import ModulePart
from supervisor.training.optimizers import OptimizerPart
from supervisor.training.reader import Mismatch, Stored
from supervisor.training.stateful import TreePart, differing
from supervisor.training.supply import Need
from supervisor.training.world import World, say


class Part(Protocol):
    """One object's share of the state."""

    name: str

    def gather(self, items: Items) -> None:
        """Contribute what is to be saved."""
        ...

    def prepare(self, stored: Stored, mismatch: Mismatch) -> dict[str, torch.Tensor]:
        """Compare, noting what does not fit, and return the tensors to load into by stored key. Changes nothing."""
        ...

    def apply(self, stored: Stored) -> None:
        """The tensors are loaded: take the state over."""
        ...


def check_objects(objects: Mapping[str, object]) -> None:
    """Refuse what a Session cannot keep. Raises UsageError."""
    seen: dict[int, str] = {}
    for name, value in objects.items():
        if not name.isidentifier() or name == OWN or name.startswith("__"):
            raise UsageError(
                f"{name!r} cannot be the name of an object: an identifier other than {OWN!r} can"
            )
        if id(value) in seen:
            raise UsageError(f"{seen[id(value)]!r} and {name!r} are the same object: give it once")
        seen[id(value)] = name
        if isinstance(value, torch.Generator):
            continue
        if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
            raise UsageError(
                f"{name!r} ({type(value).__name__}) has no state_dict() and load_state_dict(): for a DataLoader use "
                "torchdata's StatefulDataLoader, for plain values session.state"
            )


class TrainingState:
    """The objects given to a Session. Raises UsageError for those that cannot be kept."""

    def __init__(self, objects: Mapping[str, Any], values: dict[str, Any], world: World) -> None:
        self._world = world
        self._values = values
        self.modules: dict[str, nn.Module] = {n: o for n, o in objects.items() if isinstance(o, nn.Module)}
        self.optimizers: dict[str, Optimizer] = {}
        for name, value in objects.items():
            if (optimizer := unwrapped(name, value)) is not None:
                self.optimizers[name] = optimizer
        self.others = {n: o for n, o in objects.items() if n not in self.modules and n not in self.optimizers}
        self.buckets = Buckets(self.modules)
        self._rng: dict[str, Any] | None = None
        self._derive_rng = False
        self._kept: list[Items] = []  # that were gathered last
        self._of_parameters: set[torch.device] = set()
        rank = world.rank
        self.loaders: dict[str, LoaderState] = {}
        trees: list[Part] = []
        for name, value in objects.items():
            if name in self.modules or name in self.optimizers:
                continue
            if isinstance(value, torch.Generator):
                trees.append(TreePart(name, value.get_state, value.set_state, rank))
            elif is_stateful_loader(value):
                loader = self.loaders[name] = LoaderState(name, value)
                trees.append(TreePart(name, loader.get, loader.put, rank))
            else:
                trees.append(TreePart(name, value.state_dict, value.load_state_dict, rank))
        trees.append(TreePart(STATE, lambda: self._values, self._put_values, rank))
        self._trees = [part.name for part in trees]
        given = [ModulePart(name, module, rank) for name, module in self.modules.items()]
        self._parts: list[Part] = [
            *given,
            *(OptimizerPart(name, optimizer, given, rank) for name, optimizer in self.optimizers.items()),
            *trees,
        ]

    def gather(self, step: int, pending: Sequence[str] = ()) -> Items:
        """Everything of this rank, after ``step`` completed steps; ``pending`` notes the gradients that are lost.

        Tensors are those in use, not copies.
        """
        return settled(lambda: self.gather_hastily(step, pending))

    def gather_hastily(self, step: int, pending: Sequence[str] = ()) -> Items:
        """As ``gather``, with looks that are still to be taken (``Items.later``)."""
        items = Items(self._world.rank, node=self._world.node)
        for part in self._parts:
            part.gather(items)
        random, buckets, lost = rng.captured(self._devices(items)), self.buckets.capture(), list(pending)

        def own() -> dict[str, Any]:
            size = self._world.size
            return {"step": step, "world_size": size, "rng": random(), "buckets": buckets, "pending": lost}

        items.add((OWN,), Deferred(own), Owner(self._world.rank))
        return items

    def _devices(self, items: Items) -> list[torch.device]:
        """Those that this rank draws on. Its parameters are asked where they are when some part is not as it was, only."""
        if [*map(id, items.kept)] != [*map(id, self._kept)]:
            self._kept = list(items.kept)
            parameters = (p for module in self.modules.values() for p in module.parameters())
            self._of_parameters = {parameter.device for parameter in parameters}
        return rng.devices_among(self._of_parameters)

    def load(self, directory: Path, need: Need | None = None) -> int:
        """Take over the state in ``directory``, of which what is read has to be asked for if there is somebody to ask.

        Returns its step. The random state follows with ``restore_rng``.

        Raises CheckpointError for damage, StorageError for what storage would not give, and StateMismatchError, before anything is changed, for what does not fit.
        """
        stored = Stored(directory, self._world.rank, self._world.may_lack, need)
        key = stored.find((OWN,), self._world.rank)
        if key is None:
            raise CheckpointError(f"{directory} was not written by a Session: it has no {OWN!r} item")
        own = stored.objects([key])[key]
        stored.resharded = own["world_size"] != self._world.size
        mismatch = Mismatch()
        targets: dict[str, torch.Tensor] = {}
        for part in self._parts:
            targets |= part.prepare(stored, mismatch)
        mismatch.unexpected += stored.names() - _names(self._parts) - {OWN}
        mismatch.check(directory)
        stored.load(targets)
        for part in self._parts:
            part.apply(stored)
        if own["world_size"] == self._world.size:
            self.buckets.restore(own["buckets"])
        elif self._world.rank == 0 and (names := differing(stored, self._trees)):
            say(
                f"resuming {own['world_size']} ranks on {self._world.size}: the state of {', '.join(names)} differs between "
                "ranks, and ranks that are new get rank 0's; check the data position"
            )
        if (pending := own.get("pending")) and self._world.rank == 0:
            say(
                f"the state of step {own['step']} was saved while gradients of {', '.join(pending)} were accumulated: they are "
                "lost, and going on differs by them from a run that was never interrupted"
            )
        self._rng = own["rng"]
        self._derive_rng = stored.owned((OWN,), self._world.rank) is None
        return int(own["step"])

    def restore_rng(self) -> None:
        """Set the random state that was loaded, once."""
        state, self._rng = self._rng, None
        if state is None:
            return
        if self._derive_rng:
            rng.derive(state, self._world.rank)
        else:
            rng.restore(state)

    def _put_values(self, values: dict[str, Any]) -> None:
        self._values.clear()
        self._values.update(values)


def unwrapped(name: str, value: Any) -> Optimizer | None:
    """The optimizer that ``value`` is, or merely hands on; None for what is kept as any Stateful is.

    Wrappers that never call ``Optimizer.__init__`` are just Stateful, but not over sharded parameters: their state has no
    names to be resharded or even loaded by. Raises UsageError for one that cannot be seen through.
    """
    if isinstance(value, Optimizer) and hasattr(value, "_optimizer_step_post_hooks"):
        return value
    if isinstance(value, LRScheduler):
        return None
    for inner in hidden_in(value):
        sharded = any(isinstance(p, DTensor) for group in inner.param_groups for p in group["params"])
        if sharded and "param_groups" in (state := value.state_dict()):
            if isinstance(value, Optimizer) and state.keys() == {"state", "param_groups"}:
                return inner
            raise UsageError(
                f"{name!r} ({type(value).__name__}) wraps an optimizer of sharded parameters and has a state of its own: "
                f"give the {type(inner).__name__} inside it"
            )
    return None


def _names(parts: list[Part]) -> set[str]:
    return {part.name for part in parts}
