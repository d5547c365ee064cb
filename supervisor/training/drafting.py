"""Drafting a layout: DCP plans, with its collectives, what goes where; of a large state while the training goes on.

Planning thousands of tensors takes seconds, and needs nothing of them but names, shapes and places. So it can be done by a
thread, over a group of ranks that nothing else uses. Where it is done while the training stands, the first snapshot is
written as a part of it, so that what fails on one rank fails on all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from supervisor.errors import StorageError
from supervisor.training.bindings import Bindings
from supervisor.training.collecting import without_collection
from supervisor.training.copies import Node, index_of_node
from supervisor.training.items import Items
from supervisor.training.moves import Spot
from supervisor.training.planning import ArenaPlanner, ArenaStorage, Layout, spots
from supervisor.training.world import World
from supervisor.training.writer import described, mark_of, portable, put_index, save_with_dcp

Owned = set[tuple[int, int]]  # address and bytes of tensors that change in ``optimizer.step()`` alone
_PATIENCE: Final = 60.0  # seconds that the end of a Session waits for a draft that nobody needs any more


@dataclass
class Draft:
    """A layout, and the tensors that it was made for."""

    layout: Layout
    bindings: Bindings
    spots: dict[str, Spot]


def draft(
    world: World,
    group: dist.ProcessGroup | None,
    directory: Path,
    items: Items,
    *,
    cleans: bool,
    owned: Owned,
    written: Callable[[Draft], None] = lambda _: None,
) -> Draft | StorageError:
    """Plan, all ranks of ``group`` together. ``written`` writes what was planned; what it raises is all ranks' error."""
    found: list[Draft] = []

    def waits(tensor: torch.Tensor) -> bool:
        return (tensor.data_ptr(), tensor.nbytes) in owned

    def fill(layout: Layout) -> None:
        found.append(Draft(layout, Bindings(layout, items), spots(layout)))
        written(found[0])

    with without_collection():
        planner = ArenaPlanner(items, directory, cleans=cleans, ranks=world.neighbours)
        storage = ArenaStorage(directory, world.rank, items, waits, fill, copies=world.node is not None)
        outcome = save_with_dcp(storage, planner, group)
        if isinstance(outcome, StorageError):
            return outcome
        found[0].layout.mark = mark_of(outcome)
        if world.node is not None:
            problem = _index_nodes(world, world.node, group, directory, outcome, found[0].layout)
            if problem is not None:
                return problem
    return found[0]


def _index_nodes(
    world: World,
    node: Node,
    group: dist.ProcessGroup | None,
    directory: Path,
    metadata: Metadata,
    layout: Layout,
) -> StorageError | None:
    """Write the indexes that nodes have for themselves; the error, alike on all ranks. Collective over ``group``."""
    problem = None
    if node.has_own_index and world.rank == node.ranks[0]:
        layout.index = portable(index_of_node(metadata, node))
        try:
            put_index(directory, layout.index)
        except OSError as error:
            problem = described(world.rank, error)
    return next((StorageError(text) for text in world.gather(problem, group) if text is not None), None)


class Drafting:
    """A draft that a thread makes."""

    def __init__(self, make: Callable[[], Draft | StorageError]) -> None:
        self._make = make
        self._over = threading.Event()
        self._outcome: Draft | StorageError = StorageError("the layout was not made")

    def run(self) -> None:
        """Make it; on that thread."""
        try:
            self._outcome = self._make()
        except BaseException as error:  # noqa: BLE001 (it is told where the outcome is asked for)
            self._outcome = StorageError(f"{type(error).__name__}: {error}")
        self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether this rank's part is done."""
        return self._over.is_set()

    def outcome(self) -> Draft | StorageError:
        """What was made, or what went wrong, alike on all ranks. Waits."""
        self._over.wait()
        return self._outcome

    def abandon(self) -> None:
        """Nobody wants it any more, but other ranks may be waiting for this one's part; not for ever, should they be gone."""
        self._over.wait(_PATIENCE)
