"""Snapshots in this node's RAM.

A *slot* holds one snapshot: the files each rank wrote, and ``slot.json``, written by us once every rank of the job
has told that its part is whole. The slot that holds the newest complete snapshot is never offered for writing, nor is one
being drained; a slot's ``slot.json`` is removed before it is offered. So a kill at any instant leaves the newest
complete snapshot whole, and what a half-written slot holds is never taken for one.

What makes them durable is in ``draining``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from supervisor.checkpoint import slots
from supervisor.checkpoint.manifest import Key
from supervisor.edge import arenas, clock, runtimes
from supervisor.edge.control import SLOTS, offer_word
from supervisor.errors import CheckpointError, EverstepError
from supervisor.model import Fact, SnapshotCompleted

SNAPSHOT_FACT_PERIOD = 1.0  # seconds between two journal entries for snapshots


@dataclass
class _Save:
    """A snapshot being written: which ranks have told that their part is whole."""

    slot: int
    ranks: set[int] = field(default_factory=set)
    seconds: float = 0.0
    bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranks:
    """Who writes: the ranks of an attempt, ``here`` of them on this node, the ``node_rank``-th of ``nodes``."""

    attempt: int
    here: int
    world_size: int
    nodes: int = 1
    node_rank: int = 0


class Snapshots:
    """The slots of one job on this node. Used from the loop's thread only."""

    def __init__(
        self,
        runtime: Path,
        *,
        run_id: str,
        key: Key | None,
        fact: Callable[[Fact], None],
        report: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._report = report
        self._slots = [runtime / "slots" / str(index) for index in range(SLOTS)]
        self._run_id, self._key, self._fact = run_id, key, fact
        self._saves: dict[int, _Save] = {}
        self._torn: set[tuple[int, int]] = set()  # steps and slots of which some rank's part is no good
        self._complete: dict[int, slots.SlotRecord] = {}  # slot → its complete snapshot
        self._offered: int | None = None
        self._offers = 0  # so many times was one offered
        self._failed: int | None = None  # the slot that the last save failed in: another one is tried next
        self._draining: int | None = None
        self._moved = False  # a slot lies on disk: that was said
        self._said: SnapshotCompleted | None = None  # held back from the journal
        self._said_at = -math.inf  # on the monotonic clock
        self.failure: str | None = None  # why the newest snapshot failed, None once one is whole
        for index, folder in enumerate(self._slots):
            with contextlib.suppress(CheckpointError):  # damaged, or another key's: as good as empty
                record = slots.read_slot(folder, key)
                if record is not None:
                    self._complete[index] = record

    # ------------------------------------------------------------------ slots

    def offer(self) -> int | None:
        """The slot to write next; None while there is none but what is drained or needed.

        One that the last save failed in is offered again only where there is no other.
        """
        if self._offered is None:
            busy = (self._newest_slot(), self._draining)
            free = [index for index in range(SLOTS) if index not in busy]
            free = [index for index in free if index != self._failed] or free
            if free:
                # an empty one first, else the oldest
                chosen = min(
                    free, key=lambda i: age_of(self._complete[i]) if i in self._complete else (-1, -1)
                )
                try:
                    slots.invalidate(self._slots[chosen])
                except (EverstepError, OSError) as error:
                    self.failure = str(error)
                    return None
                self._make_room(chosen)
                self._complete.pop(chosen, None)
                self._take_up(chosen)
        return self._offered

    def _take_up(self, slot: int) -> None:
        self._offered = slot
        self._offers += 1
        self._torn = {(step, torn) for step, torn in self._torn if torn != slot}

    @property
    def offer_word(self) -> int:
        """The slot to write next as a rank's page says it; another word for each time that one is offered."""
        slot = self.offer()
        return 0 if slot is None else offer_word(self._offers, slot)

    def _make_room(self, slot: int) -> None:
        """Move the slot to disk if memory has no room for what it is going to hold."""
        size = arenas.largest(self._slots)  # also of one that was given up: it still takes its memory
        short = arenas.lacking(self._slots[slot], size)
        if short is None or (place := self._move_to_disk(slot)) is None:
            return
        if not self._moved:
            missing, room = (value / 1e9 for value in short)
            self._report(
                f"memory has no room for {SLOTS} snapshots ({missing:.2f} GB more are needed, {room:.2f} GB are there): "
                f"what does not fit lies in {place.parent} from now on"
            )
        self._moved = True

    def _move_to_disk(self, slot: int) -> Path | None:
        """Where it lies from now on; None if it stays where it is."""
        try:
            return runtimes.move_slot_to_disk(self._slots[slot])
        except OSError as error:
            self.failure = f"a slot stays in memory: {error.strerror or error}"
            return None

    def folder(self, slot: int) -> Path:
        """Where a slot lies."""
        return self._slots[slot]

    def newest(self) -> tuple[Path, slots.SlotRecord] | None:
        """The newest complete snapshot and where it lies."""
        index = self._newest_slot()
        return None if index is None else (self._slots[index], self._complete[index])

    def drop(self, path: Path) -> None:
        """Forget a snapshot that proved damaged."""
        for index, folder in enumerate(self._slots):
            if folder == path and index in self._complete:
                slots.invalidate(folder)
                del self._complete[index]

    def drop_unsound(self) -> list[tuple[Path, str]]:
        """Forget the newest snapshots until one is as it was when it was declared whole; which those were, and why."""
        unsound = []
        while (newest := self.newest()) is not None:
            try:
                if slots.read_slot(newest[0], self._key) is not None:
                    break  # else somebody has taken it back: a rehearsal
            except CheckpointError as error:
                unsound.append((newest[0], str(error)))
            self.drop(newest[0])
        return unsound

    def drop_all(self) -> None:
        """Forget every snapshot: the attempt resumes from a checkpoint that is newer, or better."""
        for folder in self._slots:
            self.drop(folder)

    def condemn(self, is_bad: Callable[[int, int], bool]) -> None:
        """Forget the snapshots that are bad, by attempt and step."""
        for index, record in list(self._complete.items()):
            if is_bad(record.attempt, record.step):
                self.drop(self._slots[index])

    def reset(self) -> None:
        """The attempt is over: its half-written saves are void."""
        self._saves.clear()
        self._torn.clear()
        self._offered = None
        self.flush_fact()

    def _newest_slot(self) -> int | None:
        return max(self._complete, key=lambda index: age_of(self._complete[index]), default=None)

    def part(
        self,
        rank: int,
        ranks: Ranks,
        *,
        step: int,
        slot: int,
        seconds: float,
        size: int,
        metrics: dict[str, float],
    ) -> bool:
        """One rank's part of the snapshot of ``step`` is whole; returns whether those of all ranks on this node are now.

        Raises ValueError for a slot that was not offered, StorageError when the snapshot cannot be declared whole.
        """
        if (step, slot) in self._torn:
            return False
        if slot != self._offered:
            raise ValueError(f"slot {slot} was not offered")
        save = self._saves.setdefault(step, _Save(slot))
        save.ranks.add(rank)
        save.seconds = max(save.seconds, seconds)
        save.bytes += size
        save.metrics |= metrics
        if len(save.ranks) < ranks.here:
            return False
        self._saves.clear()
        self._offered, self._failed = None, slot
        record = slots.write_slot(
            self._slots[slot],
            slots.SlotRecord(
                step=step,
                attempt=ranks.attempt,
                world_size=ranks.world_size,
                created=clock.now(),
                run_id=self._run_id,
                metrics=save.metrics,
                nodes=ranks.nodes,
                node_rank=ranks.node_rank,
            ),
            self._key,
        )
        self._complete[slot], self._failed, self.failure = record, None, None
        self._tell(
            SnapshotCompleted(
                time=record.created, attempt=ranks.attempt, step=step, seconds=save.seconds, bytes=save.bytes
            )
        )
        return True

    def abandon(self, step: int, reason: str) -> Path | None:
        """``step`` could not be written: another slot is offered next, and this one moves from memory to disk.

        Returns where to; None where it lies on disk already, or where such a move was said before.
        """
        self._saves.clear()
        self.skip(step, reason)
        if self._offered is not None:
            self._failed, self._offered = self._offered, None
        moved = None if self._failed is None else self._move_to_disk(self._failed)
        said, self._moved = self._moved, self._moved or moved is not None
        return None if said else moved

    def skip(self, step: int, reason: str) -> None:
        """``step`` could not be saved, by no fault of a slot."""
        self.failure = f"the snapshot of step {step} failed: {reason}"

    def tear(self, step: int, slot: int) -> bool:
        """One rank's part of ``step`` is no good, which the others do not know: theirs count for nothing.

        Another slot is offered next. Returns whether that is news.
        """
        if (step, slot) in self._torn or slot != self._offered:
            return False
        self._torn.add((step, slot))
        self._saves.clear()
        self._failed, self._offered = slot, None
        return True

    def _tell(self, fact: SnapshotCompleted) -> None:
        unsaid = self._said.stalled or 0.0 if self._said is not None else 0.0
        self._said = replace(fact, stalled=unsaid + fact.seconds)
        if clock.monotonic() - self._said_at >= SNAPSHOT_FACT_PERIOD:
            self.flush_fact()

    def flush_fact(self) -> None:
        """Journal the newest snapshot if that was held back."""
        if self._said is not None:
            self._fact(self._said)
            self._said_at, self._said = clock.monotonic(), None

    # ------------------------------------------------------------------ drain

    def hold(self, path: Path | None) -> None:
        """The slot that is being drained, which must not be written; None: none is."""
        self._draining = None if path is None else self._slots.index(path)


def age_of(record: slots.SlotRecord) -> tuple[int, int]:
    """Attempt and step: later attempts are newer whatever their step: they may have gone back behind a state that proved bad."""
    return record.attempt, record.step
