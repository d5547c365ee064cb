"""The snapshot engine: lay out once, then only copy; and copy behind the next step where that is safe.

The first snapshot goes through DCP: its planner decides, with collectives, who writes what. What comes out is a *layout*
(``planning``): a place in this rank's file for every item, and the index that says so to stock readers. Every later
snapshot copies tensors into their places (``moves``) and writes the few blobs anew; it plans nothing, and pickles little.

A snapshot is laid out anew when the items are not those of the layout any more: other keys, shapes, dtypes, placements, or
a blob that outgrew its room. Every rank looks at its own items, and one small collective settles it for all: *copy*, *wait*,
*lay out*, or *fail*. Everything that can fail (collecting the state, pickling, room in memory) comes before that collective;
behind it there are only copies between mapped pages. So the ranks agree on the outcome without a second one. Once all slots
are laid out, nothing depends on which of them is written: the ranks then tell each other that they are ready to *copy*
in the collective in which they agree on the slot (``ask``), and need no other.

Fresh pages cost ten times what a copy does. So the files of a large layout are made by a thread, and a snapshot that nobody
is in a hurry for is put off (*wait*) until its file is there.

While the training stands, a copy behind a step looks only at what the next forward may change. That the rest still is what
was laid out, and where it was, is looked at by the thread that copies, when it has copied. If it is not, the snapshot is
*stale*: dropped, and from then on this rank takes all looks at once.

The outcomes that a rank has for itself are a stale copy behind a step and a *torn* one (``overlap``). It says so, and the
supervisor drops that snapshot.
"""

from __future__ import annotations

import enum
import functools
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

from supervisor.errors import StorageError
from supervisor.training.bindings import Bindings, Placed
from supervisor.training.flight import OUTGROWN, TORN, Flight, Samples
from supervisor.training.items import Items, settled
from supervisor.training.layout import OutgrownError
from supervisor.training.moves import TINY, Moves, Spot, local_of
from supervisor.training.overlap import Fence, Helper, owned_by
from supervisor.training.planning import ArenaPlanner, ArenaStorage, Layout, spots
from supervisor.training.rack import Rack
from supervisor.training.slots import Slot
from supervisor.training.world import World, say
from supervisor.training.writer import (
    ASK,
    READY,
    Finished,
    Gather,
    StaleError,
    TornError,
    UnsavableError,
    Written,
    failure_of,
    save_with_dcp,
)

_LARGE: Final = 64 << 20  # bytes; the files of what is smaller are made while the training stands
_STALE_LAYOUTS: Final = 3  # after as many, this is a state that keeps changing: no look is put off any more
STALE: Final = "the state is not laid out any more as it was"

Archives = Callable[[], list[bytes]]


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


@dataclass
class _Prepared:
    """What was gathered for a copy, and since when the training stands."""

    items: Items
    archives: Archives
    started: float


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
        self._rack = Rack(slots, ranks=world.size, cleans=cleans)
        self._copying = Helper("everstep-snapshot")
        self._home = threading.get_ident()
        self._process = os.getpid()
        self._prepared: _Prepared | None = None
        self._pending: _Pending | None = None
        self._flights = itertools.count()
        self._scratch = _new_scratch()
        self._fence = Fence(self._at_fence, completed) if self._optimizers else None
        self._proof: tuple[Path, Moves] | None = None
        self._proven = False
        self._trusted = True
        self._hasty = True  # looks may be put off
        self._stale = 0  # times that they should not have been

    # ------------------------------------------------------------------ writing

    def ask(self, gather: Gather, *, behind: bool = False) -> int:
        """As the protocol says."""
        started = time.monotonic()
        self._prepared = None
        if not (behind and self._is_hasty and self._rack.is_complete):
            return ASK
        assert self._bindings is not None
        try:
            items = gather()
            if not self._bindings.fit(items):
                self._bindings = None  # half bound anew
                return ASK
            self._prepared = _Prepared(items, self._bindings.archives(items), started)
        except Exception:  # noqa: BLE001 (it comes again in ``write``, which tells the other ranks)
            return ASK
        return READY

    def write(
        self,
        directory: Path,
        gather: Gather,
        finished: Finished,
        *,
        behind: bool = False,
        agreed: int = ASK,
    ) -> None:
        """As the protocol says."""
        self.flush()
        if self._proof is not None and self._proof[0] == directory:
            self._proof = None  # what it compares with is about to be written over
        self._rack.use(directory)
        prepared, self._prepared = self._prepared, None
        if agreed == READY:
            assert prepared is not None
            self._take_off(directory, prepared, finished)
            return
        started = time.monotonic()
        way, items, archives, problem = self._prepare(directory, gather, behind=behind)
        size = _size_of(items) if way is Way.LAY_OUT and items is not None else 0
        agreed, size = self._world.largest([way, size])
        if agreed == Way.FAIL:
            self._rack.forget(directory)  # it may be moved elsewhere
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
            items = settled(gather)
            if self._layout is None or self._bindings is None or not self._bindings.fit(items):
                self._bindings = None  # half bound anew
                return Way.LAY_OUT, items, [], None
            archives = self._bindings.archives(items)()
            if behind and self._rack.is_being_made(directory) and self._layout.size > _LARGE:
                return Way.WAIT, items, [], None
            self._rack.open(directory, self._layout)
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
        """What the training has to wait for, and, unless that may be done ``behind`` the next step, the rest."""
        assert self._layout is not None
        slot = self._rack.get(directory)
        slot.fill(self._layout, archives)
        self._copy_now(slot)
        ready = self._is_ready
        if ready and self._proven and behind and slot.behind.tensors:
            self._fly(slot, lambda: None, finished, started)
            return
        slot.behind.run()
        if ready and not self._proven:
            self._proof = directory, slot.behind
        finished(self._written(time.monotonic() - started))

    def _take_off(self, directory: Path, prepared: _Prepared, finished: Finished) -> None:
        """As ``_copy`` behind the next step, with every look and all writing that can be put off done there, too."""
        slot = self._rack.get(directory)
        self._copy_now(slot)
        self._fly(slot, functools.partial(self._rest, slot, prepared), finished, prepared.started)

    def _rest(self, slot: Slot, prepared: _Prepared) -> str | None:
        """What was put off; on the copying thread."""
        assert self._layout is not None
        if not (prepared.items.hold() and slot.is_in_place):
            return STALE
        slot.fill(self._layout, prepared.archives())
        return None

    def _copy_now(self, slot: Slot) -> None:
        assert self._bindings is not None
        self._prepare_moves(slot)
        slot.now.run()
        slot.moves_of(self._bindings.restless, self._spots).run()

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

    # ------------------------------------------------------------------ laying out

    def _lay_out(
        self, directory: Path, items: Items, finished: Finished, started: float, *, ahead: bool
    ) -> None:
        """Plan, and write at once; or, ``ahead``, have the files made and put the snapshot off."""
        self._layout, self._bindings, self._proof, self._proven = None, None, None, False
        self._rack.clear()
        planner = ArenaPlanner(items, directory, cleans=self._cleans, ranks=self._world.size)

        def fill(layout: Layout) -> None:
            self._layout, self._spots = layout, spots(layout)
            self._bindings = Bindings(layout, items)
            if ahead:
                return
            slot = self._rack.make(directory, layout)
            slot.fill(layout, self._bindings.archives(items)())
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
            self._rack.clear()
            self._rack.remove(directory, storage.layout.names, index=self._world.rank == 0)
            finished(error)
            return
        self._hasty = self._stale <= _STALE_LAYOUTS
        self._rack.make_ahead(storage.layout, directory if ahead else None)
        finished(None if ahead else self._written(time.monotonic() - started))

    # ------------------------------------------------------------------ behind the step

    @property
    def _is_ready(self) -> bool:
        """Whether every optimizer stepped in this step and came through the fence."""
        passed = self._fence is not None and self._fence.all_passed(self._optimizers)
        return passed and self._trusted

    @property
    def _is_hasty(self) -> bool:
        """Whether a copy behind the next step may put off looks."""
        known = self._layout is not None and self._bindings is not None
        return self._hasty and self._proven and known and self._is_ready

    def _fly(self, slot: Slot, rest: Callable[[], str | None], finished: Finished, started: float) -> None:
        samples = slot.samples
        if samples is None or samples.moves is not slot.behind:
            samples = Samples(slot.behind, self._scratch, next(self._flights))
        flight = Flight(slot.behind, samples, rest)
        self._copying.start(flight.run)
        self._copying.start(functools.partial(self._choose_samples, slot, slot.behind))
        self._pending = _Pending(flight, finished, time.monotonic() - started)

    def _choose_samples(self, slot: Slot, moves: Moves) -> None:
        """Those of the next copy of this slot; on the copying thread."""
        slot.samples = Samples(moves, self._scratch, next(self._flights))

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
        self._copying.close()
        self._rack.close()
        if self._fence is not None:
            self._fence.close()
        self._layout, self._bindings = None, None
        if self._scratch >= 0:
            os.close(self._scratch)
            self._scratch = -1

    def _report(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        flight = pending.flight
        flight.close()
        if flight.problem is None:
            pending.finished(self._written(pending.stall + flight.waited))
        elif flight.problem in (STALE, OUTGROWN):
            self._hasty, self._stale = False, self._stale + 1
            pending.finished(StaleError(flight.problem))
        else:
            self._distrust()
            pending.finished(TornError(flight.problem))


def _new_scratch() -> int:
    """A file in memory, or -1 where there are none (the samples know what to do then)."""
    try:
        return os.memfd_create("everstep-samples")
    except OSError:
        return -1


def _size_of(items: Items) -> int:
    """Bytes of this rank's tensors, whoever stores them."""
    return sum(local_of(v).nbytes for v in items.whole().values.values() if isinstance(v, torch.Tensor))
