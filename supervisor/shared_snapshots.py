"""Snapshots of a job on several nodes: each node has the files of its own ranks, and only the leader knows when all are whole.

A slot is written by all nodes or by none, so the leader says which one it is: every node makes it ready (``prepare``), and when all have,
it is ``opened``. What is whole here (``held``) is this node's part. It is a snapshot of the job once the leader has found the part of every
node (``whole``); of its own slots the leader resumes and drains those alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from supervisor.checkpoint import slots
from supervisor.checkpoint.slots import SlotRecord
from supervisor.edge.control import SLOTS
from supervisor.errors import EverstepError
from supervisor.fleet import Held, Saved
from supervisor.model import SnapshotCompleted
from supervisor.snapshots import Snapshots, age_of

Age = tuple[int, int]


class SharedSnapshots(Snapshots):
    """The slots on one of several nodes."""

    #: what all nodes together hold, by attempt and step; only the leader knows
    whole: frozenset[Age] = frozenset()
    _opened = False
    _part_at_work: Age | None = None
    _assembled: tuple[Path, SlotRecord] | None = None
    _assembled_is_drained = False
    _when_gone: Callable[[], None] = staticmethod(lambda: None)
    #: what is being copied to other nodes, and stays for that time; only the leader knows
    copying: Age | None = None
    _last: SnapshotCompleted | None = None  # the newest part that became whole here

    @property
    def held(self) -> tuple[Held, ...]:
        """This node's parts, as it tells of them."""
        return tuple(
            Held(
                attempt=record.attempt, step=record.step, slot=slot, node_rank=record.node_rank, nodes=record.nodes,
                world_size=record.world_size,
            )
            for slot, record in sorted(self._complete.items())
        )  # fmt: skip

    def next_slot(self, but: int | None, failed: int | None = None) -> int | None:
        """The leader's choice of a slot to be written next: not the newest whole one, nor one that is drained, nor ``but``.

        The one that the last save ``failed`` in, if there is no other.
        """
        newest = self._newest_slot()
        copied = None if self.copying is None else self.find(self.copying)
        busy = {newest, self._draining, copied, but}
        free = [index for index in range(SLOTS) if index not in busy]
        free = [index for index in free if index != failed] or free
        return min(free, key=self._age_in, default=None)

    def prepare(self, slot: int) -> bool:
        """Make it ready to be written, though not yet open; whether that could be done."""
        self._opened = False
        record = self._complete.get(slot)
        if record is not None and age_of(record) == self._part_at_work:
            return False
        try:
            slots.invalidate(self._slots[slot])
        except (EverstepError, OSError) as error:
            self.failure = str(error)
            return False
        self._make_room(slot)
        self._complete.pop(slot, None)
        self._saves.clear()
        self._take_up(slot)
        return True

    def open(self, slot: int) -> None:
        """Every node has made it ready."""
        self._opened = self._offered == slot

    def offer(self) -> int | None:
        """The slot to write next; None as long as some node is not ready."""
        return self._offered if self._opened else None

    @property
    def slots(self) -> range:
        """Their numbers."""
        return range(SLOTS)

    def find(self, age: Age, part: tuple[int, int] | None = None) -> int | None:
        """The slot that holds a part of it; that of a node by its rank and of how many, if that is said."""
        for slot, record in self._complete.items():
            if age_of(record) == age and part in (None, (record.node_rank, record.nodes)):
                return slot
        return None

    def vacate(self, slot: int) -> None:
        """It is about to be filled from elsewhere."""
        slots.invalidate(self._slots[slot])
        self._complete.pop(slot, None)

    def adopt(self, slot: int) -> None:
        """It was filled from elsewhere. Raises CheckpointError."""
        record = slots.read_slot(self._slots[slot], self._key)
        if record is not None:
            self._complete[slot] = record

    def forget_others(self, slot: int) -> None:
        """Of that snapshot, this slot's part is ours now: another one's, from when this node had another rank, is there for others alone."""
        if slot not in self._complete:
            return
        age = age_of(self._complete[slot])
        for other in [one for one, record in self._complete.items() if age_of(record) == age and one != slot]:
            del self._complete[other]

    # ------------------------------------------------------------------ a whole that was put together of all parts

    def use(self, folder: Path, record: SlotRecord, gone: Callable[[], None]) -> None:
        """The whole of a snapshot lies there, until there is a newer one or it is dropped: then ``gone`` is called."""
        self._assembled = folder, record
        self._when_gone = gone

    def newest(self) -> tuple[Path, SlotRecord] | None:
        """The newest whole snapshot and where it lies: this node's part of it, or all of it."""
        own = super().newest()
        if self._assembled is None or (own is not None and age_of(own[1]) >= age_of(self._assembled[1])):
            return own
        return self._assembled

    def hold(self, path: Path | None) -> None:
        """The slot that is being drained, which must not be written; None: none is."""
        self._assembled_is_drained = self._assembled is not None and path == self._assembled[0]
        super().hold(None if self._assembled_is_drained else path)

    def drop(self, path: Path) -> None:
        """Forget a snapshot that proved damaged."""
        if self._assembled is not None and path == self._assembled[0]:
            self._let_go()
        else:
            super().drop(path)

    def drop_all(self) -> None:
        """Forget every snapshot."""
        self._let_go()
        super().drop_all()

    def condemn(self, is_bad: Callable[[int, int], bool]) -> None:
        """Forget the snapshots that are bad, by attempt and step."""
        if self._assembled is not None and is_bad(*age_of(self._assembled[1])):
            self._let_go()
        super().condemn(is_bad)

    def _let_go(self) -> None:
        if self._assembled is not None:
            self._assembled = None
            self._when_gone()

    # ------------------------------------------------------------------ its part

    def move(self, age: Age, slot: int) -> bool:
        """Have its part in the slot where the leader has its own; False where it has none."""
        found = self.find(age)
        if found is not None:
            self.move_slot(found, slot)
        return found is not None

    def move_slot(self, found: int, slot: int) -> None:
        """Have the two slots change places."""
        if found == slot:
            return
        one, other = self._slots[found], self._slots[slot]
        spare = one.with_name("moving")
        one.rename(spare)
        other.rename(one)
        spare.rename(other)
        record, displaced = self._complete.pop(found), self._complete.pop(slot, None)
        self._complete[slot] = record
        if displaced is not None:
            self._complete[found] = displaced

    def work_on(self, age: Age | None) -> None:
        """This node's part of it is being made durable; None: no more."""
        self._part_at_work = age

    def reset(self) -> None:
        """The attempt is over: its half-written saves are void."""
        super().reset()
        self._opened = False

    def tell_whole(self, fact: SnapshotCompleted) -> None:
        """The leader has found every node's part."""
        self.whole |= {(fact.attempt, fact.step)}
        if not self._assembled_is_drained:
            self._let_go()
        self.failure = None
        super()._tell(fact)

    def newest_part(self, nodes: int) -> Age | None:
        """The newest whole snapshot of so many nodes."""
        slot = self._newest_slot()
        if slot is None or self._complete[slot].nodes != nodes:
            return None
        return age_of(self._complete[slot])

    def last_part(self, step: int) -> Saved:
        """What this node has to say of its part of ``step``, which is whole."""
        fact = self._last
        if fact is None or fact.step != step:
            raise ValueError(f"no part of step {step} is whole here")
        slot = self.find((fact.attempt, fact.step))
        assert slot is not None
        return Saved(
            attempt=fact.attempt, step=step, slot=slot, seconds=fact.seconds, bytes=fact.bytes,
            metrics=dict(self._complete[slot].metrics),
        )  # fmt: skip

    @property
    def failed_slot(self) -> int | None:
        """The slot that the last save failed in."""
        return self._failed

    def _tell(self, fact: SnapshotCompleted) -> None:
        """Of one node's part nothing is journalled."""
        self._last = fact

    def _newest_slot(self) -> int | None:
        own = [slot for slot, record in self._complete.items() if age_of(record) in self.whole]
        return max(own, key=self._age_in, default=None)

    def _age_in(self, slot: int) -> Age:
        return age_of(self._complete[slot]) if slot in self._complete else (-1, -1)
