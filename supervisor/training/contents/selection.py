"""Which items are meant: all, those under a prefix, or the weights, and what these are called without their prefix.

Weights are the state of modules. A Session keeps a module's tensors as ``(name of the object, name in its state dict)``,
and nothing else of it has two components, so there they are known. In other DCP checkpoints they are guessed: tensors that
do not lie below ``state``, ``optimizer`` and the like. ``only`` is for those where that is wrong.

Where ranks hold an item each (BatchNorm statistics, a pipeline stage), the lowest rank's is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from supervisor.errors import CheckpointError, UsageError
from supervisor.training.contents.opened import Contents, Item
from supervisor.training.items import OWN

_NOT_WEIGHTS: Final = frozenset({"state", "param_groups", "optim", "optimizer", "optimizers"})

_EXTRA: Final = "_extra_state"  # ends the name of what ``nn.Module.get_extra_state`` returns


@dataclass(frozen=True)
class Selection:
    """Items by the name that each is to have, and the keys of those left out because another rank's were taken."""

    items: dict[str, Item]
    others: list[str]


def under(contents: Contents, only: str | None) -> list[Item]:
    """The items whose key is ``only`` or begins with it and a dot; all without it. Raises UsageError when there are none."""
    items = list(contents.items.values())
    if only is None:
        return items
    found = [item for item in items if _logical(item) == only or _logical(item).startswith(f"{only}.")]
    if not found:
        there = sorted({str(item.path[0]).partition(".")[0] for item in items})
        raise UsageError(
            f"nothing in {contents.directory} is called {only!r} or {only}.…; there are: {', '.join(there)}"
        )
    return found


def weights(contents: Contents) -> list[Item]:
    """The tensors of modules. Raises CheckpointError when there are none."""
    found = found_weights(contents)
    if not found:
        raise CheckpointError(
            f"{contents.directory} holds no weights (everstep checkpoints inspect shows what it holds)"
        )
    return found


def found_weights(contents: Contents) -> list[Item]:
    """As ``weights``, but there may be none."""
    tensors = [item for item in contents.items.values() if item.is_tensor]
    if contents.is_ours:
        return [item for item in tensors if len(item.path) == 2]
    return [item for item in tensors if not _NOT_WEIGHTS & {str(word) for word in item.path}]


def select(contents: Contents, *, weights_only: bool, only: str | None) -> Selection:
    """What to export, by name: a lone module's (or ``only``'s) tensors without the prefix, everything else by its key."""
    if weights_only:
        allowed = {item.key for item in (*weights(contents), *_pickled_weights(contents))}
        items = [item for item in under(contents, only) if item.key in allowed]
    else:
        items = [item for item in under(contents, only) if item.path != (OWN,)]
    if not items:
        raise UsageError(f"{only!r} in {contents.directory} holds no weights")
    chosen: dict[str, Item] = {}
    others = []
    for item in sorted(items, key=lambda item: item.owner):
        if _logical(item) in chosen:
            others.append(item.key)
        else:
            chosen[_logical(item)] = item
    prefix = only if only is not None else _common(chosen) if weights_only else None
    named = {_stripped(name, prefix): chosen[name] for name in chosen}
    return Selection({name: named[name] for name in _ordered(contents, named)}, others)


def _pickled_weights(contents: Contents) -> list[Item]:
    """Tensors of modules that lie in no plain memory (sparse, quantized): objects that are no module's extra state."""
    others = [item for item in contents.items.values() if not item.is_tensor and len(item.path) == 2]
    return [item for item in others if contents.is_ours and not str(item.path[1]).endswith(_EXTRA)]


def _common(items: dict[str, Item]) -> str | None:
    """What all names begin with: the name of the only module."""
    if any(len(item.path) < 2 for item in items.values()):
        return None
    prefixes = {tuple(map(str, item.path[:-1])) for item in items.values()}
    return ".".join(prefixes.pop()) if len(prefixes) == 1 else None


def _stripped(name: str, prefix: str | None) -> str:
    if prefix is None or not name.startswith(f"{prefix}."):
        return name
    return name[len(prefix) + 1 :]


def _logical(item: Item) -> str:
    return ".".join(map(str, item.path))


def _ordered(contents: Contents, named: dict[str, Item]) -> list[str]:
    place = {key: number for number, key in enumerate(contents.items)}
    return sorted(named, key=lambda name: place[named[name].key])
