"""Slots of RAM snapshots: which is offered, what counts as whole, and what a failure on one rank or on all does."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from supervisor.edge import clock, memory, mounts, runtimes
from supervisor.model import Fact
from supervisor.snapshots import Ranks, Snapshots


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    facts: list[Fact] = []
    return Snapshots(tmp_path / "runtime", run_id="run", key=None, fact=facts.append)


def write(snapshots: Snapshots, rank: int, step: int, slot: int) -> bool:
    folder = snapshots._slots[slot]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".metadata").touch()
    (folder / f"__{rank}_0.distcp").write_bytes(b"x")
    return snapshots.part(rank, Ranks(0, 2, 2), step=step, slot=slot, seconds=0.1, size=1, metrics={})


def test_whole_when_every_rank_has_told(snapshots: Snapshots) -> None:
    slot = snapshots.offer()
    assert slot is not None
    assert not write(snapshots, 1, 5, slot)
    assert snapshots.newest() is None
    assert write(snapshots, 0, 5, slot)
    assert snapshots.newest() is not None
    assert snapshots.offer() not in (slot, None)
    with pytest.raises(ValueError, match="not offered"):
        write(snapshots, 0, 6, slot)


def test_a_snapshot_that_proves_unsound_makes_room_for_the_one_before(snapshots: Snapshots) -> None:
    for step in (5, 6, 7):
        slot = snapshots.offer()
        assert slot is not None
        write(snapshots, 0, step, slot)
        assert write(snapshots, 1, step, slot)
    places = {}
    for step, spoil in ((7, "__1_0.distcp"), (6, "slot.json")):
        newest = snapshots.newest()
        assert newest is not None
        assert newest[1].step == step
        places[step] = newest[0]
        (newest[0] / spoil).unlink()
        told = [] if spoil == "slot.json" else [newest[0]]  # taken back is not damaged
        assert [path for path, _ in snapshots.drop_unsound()] == told
    newest = snapshots.newest()
    assert newest is not None
    assert newest[1].step == 5
    assert snapshots.drop_unsound() == []
    assert not (places[7] / "slot.json").exists()


@pytest.mark.parametrize("others_first", [True, False])
def test_torn_on_one_rank(others_first: bool, snapshots: Snapshots) -> None:
    first = snapshots.offer()
    assert first is not None
    assert not write(snapshots, 0, 4, first)
    assert write(snapshots, 1, 4, first)
    slot = snapshots.offer()
    assert slot is not None
    if others_first:
        assert not write(snapshots, 0, 5, slot)
    assert snapshots.tear(5, slot)
    assert not snapshots.tear(5, slot), "on another rank, too"
    if not others_first:
        assert not write(snapshots, 0, 5, slot)
    another = snapshots.offer()
    assert another not in (first, slot, None)
    newest = snapshots.newest()
    assert newest is not None
    assert newest[1].step == 4
    assert not write(snapshots, 0, 5, another), "the same step may be saved again"
    assert write(snapshots, 1, 5, another)
    newest = snapshots.newest()
    assert newest is not None
    assert newest[1].step == 5


def test_a_slot_that_a_save_failed_in_is_offered_again_where_there_is_no_other(snapshots: Snapshots) -> None:
    """While an older one is drained, which may take minutes."""
    first = snapshots.offer()
    assert first is not None
    write(snapshots, 0, 4, first)
    assert write(snapshots, 1, 4, first)
    snapshots.hold(snapshots.folder(first))
    second = snapshots.offer()
    assert second is not None
    write(snapshots, 0, 5, second)
    assert write(snapshots, 1, 5, second)
    third = snapshots.offer()
    assert third is not None
    word = snapshots.offer_word
    assert word & 0xFF == third + 1
    assert not write(snapshots, 0, 6, third)
    assert snapshots.tear(6, third)
    assert snapshots.offer() == third
    assert snapshots.offer_word not in (0, word), "the ranks do not write a slot twice by the same word"
    assert not write(snapshots, 0, 6, third)  # the same step again
    assert write(snapshots, 1, 6, third)
    newest = snapshots.newest()
    assert newest is not None
    assert newest[1].step == 6
    assert snapshots.offer() == second, "and another one where there is one"


def test_a_slot_that_cannot_be_moved_stays_in_memory(
    snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_slot: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for index in range(3):
        snapshots.folder(index).mkdir(parents=True)
    first = snapshots.offer()
    assert first is not None
    write(snapshots, 0, 4, first)
    assert write(snapshots, 1, 4, first)
    monkeypatch.setattr(runtimes, "move_slot_to_disk", full)
    monkeypatch.setattr(memory, "available", lambda: 0)
    monkeypatch.setattr(mounts, "is_in_memory", lambda _: True)
    slot = snapshots.offer()
    assert slot is not None
    assert snapshots.failure == "a slot stays in memory: No space left on device"
    assert snapshots.abandon(5, "no room") is None
    assert snapshots.offer() not in (first, slot, None)


def test_a_wall_clock_set_back_holds_no_snapshot_back_from_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: list[Fact] = []
    snapshots = Snapshots(tmp_path / "runtime", run_id="run", key=None, fact=facts.append)
    moments = iter([0.0, 0.0, 5.0, 5.0])
    monkeypatch.setattr(clock, "monotonic", lambda: next(moments))
    for step, wall in ((1, 5000.0), (2, 10.0)):
        monkeypatch.setattr(clock, "now", lambda wall=wall: wall)
        slot = snapshots.offer()
        assert slot is not None
        write(snapshots, 0, step, slot)
        write(snapshots, 1, step, slot)
    assert [fact.time for fact in facts] == [5000.0, 10.0]


def test_what_memory_has_no_room_for_goes_to_disk_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    runtime = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        runtimes.lay_out(runtime, runtime)
        snapshots = Snapshots(runtime, run_id="run", key=None, fact=lambda fact: None, report=said.append)
        for step in range(1, 7):
            slot = snapshots.offer()
            assert slot is not None
            write(snapshots, 0, step, slot)
            assert write(snapshots, 1, step, slot)
            monkeypatch.setattr(memory, "available", lambda: 0)  # from the second on
        places = [(runtime / "slots" / str(index)).is_symlink() for index in range(3)]
        assert places == [False, True, True]
        (line,) = said
        assert "memory has no room for 3 snapshots" in line
        newest = snapshots.newest()
        assert newest is not None
        assert newest[1].step == 6
    finally:
        runtimes.remove(runtime)
    assert not runtime.exists()


def test_what_one_takes_is_known_from_one_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that it takes is still taken: the next one would find none."""
    runtime = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        runtimes.lay_out(runtime, runtime)
        snapshots = Snapshots(runtime, run_id="run", key=None, fact=lambda fact: None)
        slot = snapshots.offer()
        assert slot is not None
        write(snapshots, 0, 1, slot)
        assert snapshots.tear(1, slot)
        monkeypatch.setattr(memory, "available", lambda: 0)
        another = snapshots.offer()
        assert another not in (slot, None)
        assert (runtime / "slots" / str(another)).is_symlink()
    finally:
        runtimes.remove(runtime)
