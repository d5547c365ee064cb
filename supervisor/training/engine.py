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

Planning takes long where there are thousands of tensors, and fresh pages cost ten times what a copy does. So a large layout
is drafted, and its files are made, by threads, and a snapshot that nobody is in a hurry for is put off (*wait*) until its file is
there.

While the training stands, a copy behind a step looks only at what the next forward may change. That the rest still is what
was laid out, and where it was, is looked at by the thread that copies, when it has copied. If it is not, the snapshot is
*stale*: dropped, and from then on this rank takes all looks at once.

The outcomes that a rank has for itself are a stale copy behind a step and a *torn* one (``overlap``). It says so, and the
supervisor drops that snapshot.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch.optim import Optimizer

from supervisor.checkpoint.stamps import UNFINISHED
from supervisor.errors import StorageError
from supervisor.training import gpu
from supervisor.training.behind import STALE, Behind
from supervisor.training.bindings import Bindings, Placed
from supervisor.training.collecting import without_collection
from supervisor.training.drafting import Draft, Drafting, draft
from supervisor.training.flight import Work
from supervisor.training.frozen import Frozen, stretches
from supervisor.training.items import Items, settled
from supervisor.training.layout import OutgrownError
from supervisor.training.moves import Spot, local_of
from supervisor.training.overlap import Helper, owned_by
from supervisor.training.planning import Layout, file_names
from supervisor.training.rack import Rack
from supervisor.training.slots import Slot
from supervisor.training.world import World
from supervisor.training.writer import (
    ASK,
    READY,
    Finished,
    Gather,
    UnsavableError,
    Written,
    failure_of,
)

_LARGE: Final = 64 << 20  # bytes; what is smaller is laid out while the training stands
_EACH: Final = 16 << 10  # bytes; what the planning of a tensor weighs

Archives = Callable[[], list[bytes]]


class Way(enum.IntEnum):
    """How a snapshot is written; the ranks take the largest."""

    COPY = 0
    WAIT = 1
    LAY_OUT = 2
    FAIL = 3


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
        self._rack = Rack(slots, ranks=world.neighbours, cleans=cleans, device=gpu.of(self._optimizers))
        self._drafting: Drafting | None = None
        self._is_drafted = False  # whether the layout was: its files are waited for likewise
        self._making = Helper("everstep-layout")
        self._frozen = Frozen()
        self._behind = Behind(self._optimizers, completed, world.rank)
        self._prepared: _Prepared | None = None
        self._completed = completed
        self._step = 0  # of the snapshot that is written

    # ------------------------------------------------------------------ writing

    def ask(self, gather: Gather, *, behind: bool = False) -> int:
        """As the protocol says."""
        started = time.monotonic()
        self.flush()  # what it holds must not change under the copying thread
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
        self._behind.is_written_over(directory)
        self._rack.use(directory)
        self._step = self._completed()
        prepared, self._prepared = self._prepared, None
        if agreed == READY:
            assert prepared is not None
            self._take_off(directory, prepared, finished)
            return
        started = time.monotonic()
        way, items, archives, problem = self._prepare(directory, gather, behind=behind)
        weight = _weight_of(items) if way is Way.LAY_OUT and items is not None else 0
        agreed, weight = self._world.largest([way, weight])
        if agreed == Way.FAIL:
            self._forget_draft()  # another rank may have found that it failed, and asks for a new one
            self._rack.forget(directory)  # it may be moved elsewhere
            finished(self._worst(problem))
        elif agreed == Way.WAIT:
            finished(None)
        elif agreed == Way.LAY_OUT:
            assert items is not None
            self._lay_out(directory, items, finished, started, ahead=behind and weight > _LARGE)
        else:
            assert items is not None
            self._copy(directory, archives, finished, started, behind=behind)

    def _prepare(
        self, directory: Path, gather: Gather, *, behind: bool
    ) -> tuple[Way, Items | None, list[bytes], StorageError | None]:
        """Everything that can fail."""
        try:
            with contextlib.nullcontext() if self._layout is not None else without_collection():
                items = settled(gather)
            if self._drafting is not None:
                if behind and not self._drafting.is_over:
                    return Way.WAIT, items, [], None
                if (problem := self._adopt(directory)) is not None:
                    return Way.FAIL, None, [], problem
            if self._layout is None or self._bindings is None or not self._bindings.fit(items):
                self._bindings = None  # half bound anew
                return Way.LAY_OUT, items, [], None
            archives = self._bindings.archives(items)()
            if behind and self._is_drafted and self._rack.is_being_made(directory):
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
        slot.stamp(self._layout, UNFINISHED)
        slot.fill(self._layout, archives)
        now = self._start_now(slot)
        if behind and slot.is_worth_waiting_for and self._behind.may_fly:
            self._fly(slot, now, None, finished, started)
            return
        slot.behind.run()
        slot.frozen.run()
        gpu.wait(gpu.mark(now))
        if self._behind.offer_proof(directory, slot.behind):
            self._frozen.find_written(slot)
        finished(self._written(slot, time.monotonic() - started))

    def _take_off(self, directory: Path, prepared: _Prepared, finished: Finished) -> None:
        """As ``_copy`` behind the next step, with every look and all writing that can be put off done there, too."""
        assert self._layout is not None
        slot = self._rack.get(directory)
        slot.stamp(self._layout, UNFINISHED)
        now = self._start_now(slot)
        self._fly(slot, now, functools.partial(self._rest, slot, prepared), finished, prepared.started)

    def _fly(
        self,
        slot: Slot,
        now: set[torch.device],
        rest: Work | None,
        finished: Finished,
        started: float,
    ) -> None:
        """Have the rest copied behind the next step, and what does not change in steps after that."""
        unhurried: Work | None = None
        if self._frozen.may_wait(slot):
            self._frozen.note(slot)
            unhurried = functools.partial(self._frozen.copy, slot)
        else:
            slot.frozen.start()
        written = functools.partial(self._written, slot)
        self._behind.fly(slot, now | slot.frozen.devices, rest, unhurried, written, finished, started)

    def _rest(self, slot: Slot, prepared: _Prepared) -> str | None:
        """What was put off; on the copying thread."""
        assert self._layout is not None
        if not (prepared.items.hold() and slot.is_in_place):
            return STALE
        slot.fill(self._layout, prepared.archives())
        return None

    def _start_now(self, slot: Slot) -> set[torch.device]:
        """Copy what the next forward may change; the devices on which that is queued."""
        assert self._bindings is not None
        self._prepare_moves(slot)
        restless = slot.moves_of(self._bindings.restless, self._spots)
        slot.now.start()
        restless.start()
        return slot.now.devices | restless.devices

    def _written(self, slot: Slot, seconds: float) -> Written:
        assert self._layout is not None
        slot.stamp(self._layout, self._step)
        self._frozen.is_whole(slot)
        return Written(self._layout.size, seconds, self._layout.all_names)

    def _prepare_moves(self, slot: Slot) -> None:
        bindings = self._bindings
        assert self._layout is not None
        assert bindings is not None
        self._frozen.look(bindings)
        held = tuple(len(group["params"]) for o in self._optimizers for group in o.param_groups)
        generation = bindings.generation, held, self._frozen.generation
        if slot.generation == generation:
            return
        slot.generation = generation
        owned = owned_by(self._optimizers)
        mine: Placed = []
        frozen: Placed = []
        others: Placed = []
        for placed in bindings.sources:
            place, source = placed
            if (source.address, source.bytes) in owned:
                mine.append(placed)
            else:
                (frozen if place.key in self._frozen else others).append(placed)
        slot.behind, slot.now = slot.moves_of(mine, self._spots), slot.moves_of(others, self._spots)
        slot.frozen = slot.moves_of(frozen, self._spots)
        slot.stretches = stretches(self._layout, {place.key for place, _ in frozen})

    # ------------------------------------------------------------------ laying out

    def _lay_out(
        self, directory: Path, items: Items, finished: Finished, started: float, *, ahead: bool
    ) -> None:
        """Plan, and write at once; or, ``ahead``, have it planned and the files made, and put the snapshot off."""
        self._forget_draft()  # of what does not fit any more
        self._layout, self._bindings = None, None
        self._behind.start_anew()
        self._frozen.start_anew(None, None)
        self._rack.clear()
        owned = owned_by(self._optimizers)
        plan = functools.partial(draft, self._world, cleans=self._cleans, owned=owned)
        if ahead:
            group = self._world.apart()
            self._drafting = Drafting(functools.partial(plan, group, directory, items))
            self._making.start(self._drafting.run)
            finished(None)
            return

        def written(made: Draft) -> None:
            self._take_over(made)
            slot = self._rack.make(directory, made.layout)
            slot.fill(made.layout, made.bindings.archives(items)())
            self._prepare_moves(slot)
            for moves in (slot.now, slot.behind, slot.frozen):
                moves.run()

        outcome = plan(self._world.group, directory, items, written=written)
        if isinstance(outcome, StorageError):
            self._layout, self._bindings = None, None
            self._rack.clear()
            self._rack.remove(directory, file_names(self._world.rank), index=self._cleans)
            finished(outcome)
            return
        self._rack.make_ahead(outcome.layout, None)
        finished(self._written(self._rack.get(directory), time.monotonic() - started))

    def _forget_draft(self) -> None:
        if self._drafting is not None:
            self._drafting.outcome()
            self._drafting = None

    def _take_over(self, made: Draft) -> None:
        self._layout, self._bindings, self._spots = made.layout, made.bindings, made.spots
        self._frozen.start_anew(made.layout, made.bindings)
        self._is_drafted = False

    def _adopt(self, directory: Path) -> StorageError | None:
        """Take over what was drafted, and have the files made; the error, alike on all ranks, if that failed."""
        assert self._drafting is not None
        outcome = self._drafting.outcome()
        self._drafting = None
        if isinstance(outcome, StorageError):
            return outcome
        self._take_over(outcome)
        self._is_drafted = True
        self._rack.make_ahead(outcome.layout, directory)
        return None

    # ------------------------------------------------------------------ behind the step

    @property
    def _is_hasty(self) -> bool:
        """Whether a copy behind the next step may put off looks."""
        return self._layout is not None and self._bindings is not None and self._behind.may_be_hasty

    def poll(self) -> None:
        """As the protocol says."""
        self._behind.poll()

    @property
    def is_busy(self) -> bool:
        """Whether ``poll`` has something to wait for."""
        return self._behind.is_busy

    def flush(self) -> None:
        """As the protocol says."""
        self._behind.flush()

    def close(self) -> None:
        """Wait for what is under way, and let go of everything."""
        if self._drafting is not None:
            self._drafting.abandon()
            if not self._drafting.is_over:
                self._making.leave()
            self._drafting = None
        self._making.close()
        self._behind.close()
        self._frozen.close()
        self._rack.close()
        self._layout, self._bindings = None, None


def _weight_of(items: Items) -> int:
    """Bytes of this rank's tensors, whoever stores them, and what each weighs beside them."""
    tensors = [v for v in items.whole().values.values() if isinstance(v, torch.Tensor)]
    return sum(local.numel() * local.element_size() + _EACH for local in map(local_of, tensors))
