"""What is saved, as flat keys: which rank writes an item, and under which key.

An item's *logical* key is that of a stock DCP state dict (``model.net.weight``, ``optimizer.state.net.weight.exp_avg``).
DCP stores each key once. What may differ between ranks therefore bears the rank that owns it in its key: rank 0's
items keep the plain key, so that stock tools find them, and those of rank r are called ``__rank_<r>__.<logical key>``.

- *Sharded* items (DTensors) are written by all ranks that hold a part, and DCP joins the parts.
- *Replicated* items have one owner, the lowest rank of their group, and nobody else writes them. (Stock DCP lets the
  least loaded rank write: with BatchNorm buffers, which differ between ranks, that restores another rank's.)
- Everything else is owned by the rank it is on.

On several nodes, some ranks moreover keep a copy of what a rank elsewhere stores (``copies``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from supervisor.training.copies import Node, holders_of, offsets_of
from supervisor.training.moves import local_of

#: the path to an item in the nested state dict, as DCP keeps it: strings for dicts, integers for lists
Path = tuple[str | int, ...]

OWN: Final = "session"  # the Session's own item
STATE: Final = "session.state"  # the dict of plain values that a script keeps in ``session.state``

_OWNED: Final = re.compile(r"__rank_([0-9]+)__")


@dataclass(frozen=True)
class Owner:
    """Who writes an item: rank ``rank`` alone, or with ``everyone`` each rank that holds a part, under ``rank``'s key.

    ``holders`` are the ranks that hold it, if that is more than one.
    """

    rank: int
    everyone: bool = False
    holders: frozenset[int] = frozenset()


class Deferred:
    """A value that was captured, and is put into its form when it is asked for, by any thread; nobody else changes it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._value: Any = None

    def value(self) -> Any:
        """The value."""
        if self._make is not None:
            self._value, self._make = self._make(), None
        return self._value


def resolved(value: Any) -> Any:
    """The value itself."""
    return value.value() if isinstance(value, Deferred) else value


def settled(gather: Callable[[], Items]) -> Items:
    """What is gathered, with no look put off."""
    while not (items := gather()).hold():
        pass  # what did not hold is gathered anew
    items.later.clear()
    return items


@dataclass
class Items:
    """What one rank contributes to a snapshot: values by flat key, and each key's path in the nested state dict.

    ``kept`` are items gathered before that hold still: the same object, the same values in the same place. Whoever has
    seen one need not look into it again, which is what makes thousands of tensors cheap.

    ``later`` are looks that were put off: the items are those of now if all of them say yes, before any optimizer steps.

    ``node`` is that of this rank, where there are several.
    """

    rank: int
    values: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    kept: list[Items] = field(default_factory=list)
    later: list[Callable[[], bool]] = field(default_factory=list)
    constant: set[str] = field(
        default_factory=set
    )  # keys of tensors that nothing has changed so far: frozen weights
    #: by key: the object that the training has of a value which is only a view of it, or a part; where those are told apart
    holders: dict[str, torch.Tensor] = field(default_factory=dict)
    node: Node | None = None

    def part(self) -> Items:
        """One for this rank that is still empty, to be kept by this one."""
        return Items(self.rank, node=self.node)

    def add(
        self,
        path: Path,
        value: object,
        owner: Owner,
        *,
        constant: bool = False,
        holder: torch.Tensor | None = None,
    ) -> None:
        """Contribute ``value`` if this rank is to write it."""
        if owner.rank:
            path = (f"__rank_{owner.rank}__", *path)
        if owner.rank == self.rank or owner.everyone:
            self._put(path, value, constant, holder)
        if self.node is None:
            return
        if not owner.everyone:
            if self.node.copies(self.rank, owner.holders):
                self._put((self.node.prefix(), *path), value, constant, holder)
        elif isinstance(value, DTensor) and self.node.copies(self.rank, holders_of(value)):
            whole = value if holder is None else holder
            self._put((self.node.prefix(offsets_of(value)), *path), local_of(value), constant, whole)

    def _put(self, path: Path, value: object, constant: bool, holder: torch.Tensor | None) -> None:
        key = flat(path)
        if key in self.values:
            raise ValueError(f"two items are called {key!r}")
        self.values[key] = value
        self.paths[key] = path
        if constant:
            self.constant.add(key)
        if holder is not None:
            self.holders[key] = holder

    def keep(self, other: Items) -> None:
        """Contribute all of another's, which will not be changed any more."""
        self.kept.append(other)

    def hold(self) -> bool:
        """Take the looks that were put off; all of them, so that each part knows how it stands."""
        looks = [look() for look in self.later]
        return all(looks)

    def whole(self) -> Items:
        """All of it, in one, with nothing deferred."""
        if not self.kept and not any(isinstance(value, Deferred) for value in self.values.values()):
            return self
        whole = Items(self.rank)
        own = Items(self.rank, self.values, self.paths, constant=self.constant, holders=self.holders)
        for part in (*self.kept, own):
            if twice := whole.values.keys() & part.values.keys():
                raise ValueError(f"two items are called {min(twice)!r}")
            whole.values.update((key, resolved(value)) for key, value in part.values.items())
            whole.paths.update(part.paths)
            whole.constant |= part.constant
            whole.holders.update(part.holders)
        return whole


def flat(path: Path) -> str:
    """The flat key of a path, as DCP forms it."""
    return ".".join(map(str, path))


def owner_of(path: Path) -> tuple[int, Path]:
    """The owning rank and the logical path of a stored path."""
    match = _OWNED.fullmatch(str(path[0]))
    return (int(match[1]), path[1:]) if match else (0, path)


def mesh_owner(tensor: DTensor) -> Owner:
    """The owner of a DTensor. A mesh without rank 0 (another pipeline stage's) gets keys of its own."""
    ranks: list[int] = tensor.device_mesh.mesh.flatten().tolist()
    return Owner(min(ranks), everyone=True, holders=frozenset(ranks))
