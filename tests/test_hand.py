"""What a node does about an order, and about one that is no longer in force."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from supervisor.attempt import Attempt
from supervisor.checkpoint import slots
from supervisor.checkpoint.slots import SlotRecord
from supervisor.edge import clock
from supervisor.edge.control import ControlPage, Word
from supervisor.edge.store.memory import MemoryStore
from supervisor.fleet import Assignment, Ended, Member, Order, Report, SlotOrder
from supervisor.hand import SHARES_PERIOD, Hand
from supervisor.joining import Joining
from supervisor.peer_copies import PeerCopies
from supervisor.seat import Seat
from supervisor.shared_snapshots import SharedSnapshots


class Bench:
    """A node "b" that has a part of step 24 of attempt 1 in slot 0, and has heard of an order of leader "a"."""

    def __init__(self, folder: Path, store: MemoryStore) -> None:
        self.folder = folder
        (folder / "slots" / "0").mkdir(parents=True)
        for name in (".metadata", "__1_0.distcp"):
            (folder / "slots" / "0" / name).write_bytes(b"x")
        slots.write_slot(
            folder / "slots" / "0",
            SlotRecord(step=24, attempt=1, world_size=2, created=0.0, run_id="run", metrics={}, nodes=2),
            None,
        )
        self.snapshots = SharedSnapshots(folder, run_id="run", key=None, fact=lambda _fact: None)
        self.joining = Joining(
            store, Report(name="b", life="1", host="b", pid=1, address="127.0.0.1", port=1), 5.0
        )
        copies = PeerCopies(
            folder, b"secret", None, self.snapshots, address="127.0.0.1", bandwidth=None, say=lambda _: None
        )
        members = (Member(name="a", life="1"), Member(name="b", life="1"))
        run = Assignment(attempt=1, members=members, address="127.0.0.1", port=1)
        self.order = Order(serial=9, leader="a 1", epoch=1, run_id="run", run=run)
        self.joining.leader = "a 1"

        def no_drain(*_: object) -> object:
            raise AssertionError

        self.hand = Hand(self.joining, self.snapshots, no_drain, lambda _: None, copies)  # type: ignore[arg-type]

    def begin(self, number: int) -> None:
        self.hand.begin(
            Attempt(number, self.folder / "attempts" / str(number), self.folder, "run", nodes=2, node_rank=1)
        )

    def heed(self, slot: int, **changes: object) -> None:
        order = replace(self.order, slot=SlotOrder(serial=7, index=slot, offered=True))
        self.joining.order = replace(order, **changes)  # type: ignore[arg-type]
        self.hand.heed()

    @property
    def held(self) -> list[tuple[int, int, int]]:
        return [(one.attempt, one.step, one.slot) for one in self.snapshots.held]


def run(folder: Path, test: Callable[[Bench], None]) -> None:
    async def main() -> None:
        async with MemoryStore() as store:
            bench = Bench(folder, store)
            test(bench)
            await bench.hand.close()

    asyncio.run(main())


def test_a_slot_is_made_ready_and_opened_for_the_attempt_that_runs(tmp_path: Path) -> None:
    def test(bench: Bench) -> None:
        bench.begin(1)
        bench.heed(1)
        assert bench.snapshots.offer() == 1
        assert bench.held == [(1, 24, 0)]
        assert bench.joining.report.prepared == 7

    run(tmp_path, test)


def test_no_slot_is_touched_for_another_attempt_or_a_leader_that_was(tmp_path: Path) -> None:
    """What lies there may be what the attempt resumes from."""

    def test(bench: Bench) -> None:
        bench.heed(0)  # a spare
        bench.joining.leader = "b 1"
        bench.begin(1)
        bench.heed(0)  # the next leader's own first order is not out yet
        bench.joining.leader = "a 1"
        bench.begin(2)
        bench.heed(0)  # the attempt before
        bench.hand.over(Ended(step=30, finished=True, completed=True))
        assert bench.order.run is not None
        bench.heed(0, run=replace(bench.order.run, attempt=2))  # it is over here
        assert bench.snapshots.offer() is None
        assert bench.held == [(1, 24, 0)]
        assert bench.joining.report.prepared == 0

    run(tmp_path, test)


def test_the_own_time_of_its_ranks_is_told_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(clock, "monotonic", lambda: now)

    def test(bench: Bench) -> None:
        nonlocal now
        bench.begin(1)
        attempt = bench.hand.attempt
        assert attempt is not None
        attempt.local_size = attempt.world_size = 2
        pages = [ControlPage(tmp_path / f"rank-{number}", create=True) for number in (0, 1)]
        for number, page in enumerate(pages):
            attempt.seats[2 + number] = Seat(2 + number, number, 1, None, page)

        def told() -> tuple[int, ...]:
            bench.hand.tell()
            course = bench.joining.report.course
            assert course is not None
            return course.shares

        assert told() == (-1, -1)
        pages[1][Word.OWN_SHARE] = struct.unpack("Q", struct.pack("d", 0.904))[0]
        assert told() == (-1, -1), "too soon"
        now += SHARES_PERIOD
        assert told() == (-1, 90)
        for page in pages:
            page.close()

    run(tmp_path, test)
