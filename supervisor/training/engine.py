"""The snapshot engine: lay out once, then only copy; and copy behind the next step where that is safe.

The first snapshot goes through DCP: its planner decides, with collectives, who writes what. What comes out is a *layout*
(``planning``): a place in this rank's file for every item, and the index that says so to stock readers. Every later
snapshot copies tensors into their places (``moves``) and writes the few blobs anew; it plans nothing, and pickles little.

A snapshot is laid out anew when the items are not those of the layout any more: other keys, shapes, dtypes, placements, or
a blob that outgrew its room. Every rank looks at its own items, and one small collective settles it for all: *copy*, *wait*,
*lay out*, or *fail*. Everything that can fail (collecting the state, pickling, room in memory) comes before that collective;
behind it there are only copies between mapped pages. So the ranks agree on the outcome without a second one.

Fresh pages cost ten times what a copy does. So the files of a large layout are made by a thread, and a snapshot that nobody
is in a hurry for is put off (*wait*) until its file is there.

The one outcome that a rank has for itself is a *torn* copy behind a step (``overlap``). It says so, and the supervisor
drops that snapshot.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import operator
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch.optim import Optimizer

from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.errors import StorageError
from supervisor.training.bindings import Bindings, Placed
from supervisor.training.items import Items
from supervisor.training.layout import OutgrownError
from supervisor.training.moves import TINY, Moves, Spot, local_of
from supervisor.training.overlap import TORN, Fence, Flight, Helper, owned_by
from supervisor.training.planning import ArenaPlanner, ArenaStorage, Layout, make_place, spots
from supervisor.training.slots import Ahead, Slot, new_arenas
from supervisor.training.world import World, say
from supervisor.training.writer import (
    Finished,
    Gather,
    TornError,
    UnsavableError,
    Written,
    failure_of,
    save_with_dcp,
)

_LARGE: Final = 64 << 20  # bytes; the files of what is smaller are made while the training stands


class Way(enum.IntEnum):
    """How a snapshot is written; the ranks take the largest."""

    COPY = 0
    WAIT = 1
    LAY_OUT = 2
    FAIL = 3


@dataclass
class _Pending:
    flight: Flight
    finished: Finished
    stall: float  # seconds that the training stood


class ArenaWriter:
    """A SnapshotWriter that writes into arenas. ``completed`` tells how many steps are complete.

    ``slots`` are made ready ahead, off the training's thread, unless they hold a snapshot.
    """

    def __init__(
        self,
        world: World,
        *,
        cleans: bool,
        optimizers: Mapping[str, Optimizer] | None = None,
        completed: Callable[[], int] = lambda: 0,
        slots: Sequence[Path] = (),
    ) -> None:
        self._world = world
        self._cleans = cleans
        self._optimizers = list((optimizers or {}).values())
        self._layout: Layout | None = None
        self._bindings: Bindings | None = None
        self._spots: dict[str, Spot] = {}  # by key
        self._slots: dict[Path, Slot] = {}
        self._ahead: dict[Path, Ahead] = {}
        self._spare = tuple(slots)
        self._used: set[Path] = set()
        self._copying = Helper("everstep-snapshot")
        self._making = Helper("everstep-arenas")
        self._home = threading.get_ident()
        self._process = os.getpid()
        self._pending: _Pending | None = None
        self._flights = itertools.count()
        self._fence = Fence(self._at_fence, completed) if self._optimizers else None
        self._proof: tuple[Path, Moves] | None = None
        self._proven = False
        self._trusted = True

    # ------------------------------------------------------------------ writing

    def write(self, directory: Path, gather: Gather, finished: Finished, *, behind: bool = False) -> None:
        """As the protocol says."""
        self.flush()
        if self._proof is not None and self._proof[0] == directory:
            self._proof = None  # what it compares with is about to be written over
        self._used.add(directory)
        started = time.monotonic()
        way, items, archives, problem = self._prepare(directory, gather, behind=behind)
        size = _size_of(items) if way is Way.LAY_OUT and items is not None else 0
        agreed, size = self._world.largest([way, size])
        if agreed == Way.FAIL:
            self._drop(directory)
            finished(self._worst(problem))
        elif agreed == Way.WAIT:
            finished(None)
        elif agreed == Way.LAY_OUT:
            assert items is not None
            self._lay_out(directory, items, finished, started, ahead=behind and size > _LARGE)
        else:
            assert items is not None
            self._copy(directory, archives, finished, started, behind=behind)

    def _prepare(
        self, directory: Path, gather: Gather, *, behind: bool
    ) -> tuple[Way, Items | None, list[bytes], StorageError | None]:
        """Everything that can fail."""
        try:
            items = gather()
            if self._layout is None or self._bindings is None or not self._bindings.fit(items):
                self._bindings = None  # half bound anew
                return Way.LAY_OUT, items, [], None
            archives = self._bindings.archives(items)
            ahead = self._ahead.get(directory)
            if behind and ahead is not None and not ahead.is_over and self._layout.size > _LARGE:
                return Way.WAIT, items, [], None
            self._open(directory)
        except OutgrownError:
            return Way.LAY_OUT, items, [], None
        except Exception as error:  # noqa: BLE001 (a failure of the snapshot, on all ranks; the training goes on)
            return Way.FAIL, None, [], failure_of({self._world.rank: error})
        return Way.COPY, items, archives, None

    def _worst(self, problem: StorageError | None) -> StorageError:
        """What went wrong on any rank, alike on all. Collective."""
        own = None if problem is None else (isinstance(problem, UnsavableError), str(problem))
        unsavable, text = max((told for told in self._world.gather(own) if told), key=operator.itemgetter(0))
        return UnsavableError(text) if unsavable else StorageError(text)

    def _copy(
        self, directory: Path, archives: list[bytes], finished: Finished, started: float, *, behind: bool
    ) -> None:
        assert self._layout is not None and self._bindings is not None
        slot = self._slots[directory]
        slot.fill(self._layout, archives)
        self._prepare_moves(slot)
        slot.now.run()
        slot.moves_of(self._bindings.restless, self._spots).run()
        ready = self._is_ready()
        if ready and self._proven and behind and slot.behind.sources:
            flight = Flight(slot.behind, next(self._flights))
            self._copying.start(flight.run)
            self._pending = _Pending(flight, finished, time.monotonic() - started)
            return
        slot.behind.run()
        if ready and not self._proven:
            self._proof = directory, slot.behind
        finished(self._written(time.monotonic() - started))

    def _written(self, seconds: float) -> Written:
        assert self._layout is not None
        return Written(self._layout.size, seconds, self._layout.all_names)

    def _prepare_moves(self, slot: Slot) -> None:
        bindings = self._bindings
        assert bindings is not None
        held = tuple(len(group["params"]) for o in self._optimizers for group in o.param_groups)
        if slot.generation == (bindings.generation, held):
            return
        slot.generation = bindings.generation, held
        owned = owned_by(self._optimizers)
        mine: Placed = []
        others: Placed = []
        for placed in bindings.sources:
            source = placed[1]
            waits = source.bytes > TINY and (source.address, source.bytes) in owned
            (mine if waits else others).append(placed)
        slot.behind, slot.now = slot.moves_of(mine, self._spots), slot.moves_of(others, self._spots)

    # ------------------------------------------------------------------ slots

    def _open(self, directory: Path) -> None:
        """Lay out this slot, if it is not. Raises OSError."""
        slot = self._slots.get(directory)
        if slot is not None and slot.is_in_place:
            return
        layout = self._layout
        assert layout is not None
        self._slots.pop(directory, None)
        if self._cleans:
            make_place(directory, self._world.size)
        self._slots[directory] = self._new_slot(directory, layout)
        if layout.index is not None:
            temporary = directory / ".metadata.tmp"
            temporary.write_bytes(layout.index)
            temporary.rename(directory / ".metadata")

    def _new_slot(self, directory: Path, layout: Layout) -> Slot:
        ahead = self._ahead.pop(directory, None)
        arenas = ahead.result() if ahead is not None else None
        slot = Slot(arenas or [], [None] * len(layout.blobs))
        if not arenas or not slot.is_in_place:
            slot.arenas = new_arenas(directory, layout)
        return slot

    # ------------------------------------------------------------------ laying out

    def _lay_out(
        self, directory: Path, items: Items, finished: Finished, started: float, *, ahead: bool
    ) -> None:
        """Plan, and write at once; or, ``ahead``, have the files made and put the snapshot off."""
        self._layout, self._bindings, self._proof, self._proven = None, None, None, False
        self._drop_slots()
        planner = ArenaPlanner(items, directory, cleans=self._cleans, ranks=self._world.size)

        def fill(layout: Layout) -> None:
            self._layout, self._spots = layout, spots(layout)
            self._bindings = Bindings(layout, items)
            if ahead:
                return
            self._slots[directory] = slot = self._new_slot(directory, layout)
            slot.fill(layout, self._bindings.archives(items))
            self._prepare_moves(slot)
            slot.now.run()
            slot.behind.run()

        owned = owned_by(self._optimizers)

        def waits(tensor: torch.Tensor) -> bool:
            return tensor.nbytes > TINY and (tensor.data_ptr(), tensor.nbytes) in owned

        storage = ArenaStorage(directory, self._world.rank, items, waits, fill)
        error = save_with_dcp(self._world, storage, planner)
        if error is not None:
            self._layout, self._bindings = None, None
            self._drop_slots()
            with contextlib.suppress(OSError):
                self._remove(directory, storage.layout.names)
            finished(error)
            return
        # one that was written may be about to be declared a snapshot
        spare = [path for path in self._spare if path not in self._used and not (path / SLOT_NAME).exists()]
        for path in [directory, *spare] if ahead else spare:
            self._ahead[path] = Ahead(path, storage.layout)
            self._making.start(self._ahead[path].run)
        finished(None if ahead else self._written(time.monotonic() - started))

    def _drop(self, directory: Path) -> None:
        """Let go of a slot that may be moved elsewhere: nothing of it is at work or mapped when all ranks were told."""
        if (ahead := self._ahead.pop(directory, None)) is not None:
            ahead.result()
        self._slots.pop(directory, None)

    def _drop_slots(self) -> None:
        for ahead in self._ahead.values():
            ahead.result()
        self._ahead.clear()
        self._slots.clear()

    def _remove(self, directory: Path, names: Sequence[str]) -> None:
        for name in names:
            (directory / name).unlink(missing_ok=True)
        if self._world.rank == 0:
            (directory / ".metadata").unlink(missing_ok=True)
            (directory / ".metadata.tmp").unlink(missing_ok=True)

    # ------------------------------------------------------------------ behind the step

    def _is_ready(self) -> bool:
        """Whether every optimizer stepped in this step and came through the fence."""
        passed = self._fence is not None and self._fence.all_passed(self._optimizers)
        return passed and self._trusted

    def _at_fence(self) -> None:
        """An optimizer is about to step."""
        if os.getpid() != self._process:
            return  # a forked child has its own memory, and no copying thread
        if self._pending is not None:
            self._pending.flight.close()
            if threading.get_ident() == self._home:
                self._report()
        if self._proof is not None:
            (_, copied), self._proof = self._proof, None
            if copied.differs():
                self._distrust()
            else:
                self._proven = True

    def _distrust(self) -> None:
        self._trusted = False
        say(f"rank {self._world.rank}: {TORN}: snapshots are copied while the training waits from here on")

    def poll(self) -> None:
        """As the protocol says."""
        if self._pending is not None and self._pending.flight.is_over:
            self._report()

    @property
    def is_busy(self) -> bool:
        """Whether ``poll`` has something to wait for."""
        return self._pending is not None

    def flush(self) -> None:
        """As the protocol says."""
        if self._pending is not None:
            self._report()

    def close(self) -> None:
        """Wait for what is under way, and let go of everything."""
        self.flush()
        self._drop_slots()
        self._copying.close()
        self._making.close()
        if self._fence is not None:
            self._fence.close()
        self._layout, self._bindings = None, None

    def _report(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        flight = pending.flight
        flight.close()
        if flight.problem is None:
            pending.finished(self._written(pending.stall + flight.waited))
            return
        self._distrust()
        pending.finished(TornError(flight.problem))


def _size_of(items: Items) -> int:
    """Bytes of this rank's tensors, whoever stores them."""
    return sum(local_of(v).nbytes for v in items.whole().values.values() if isinstance(v, torch.Tensor))
