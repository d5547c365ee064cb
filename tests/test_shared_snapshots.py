"""Slots that all nodes write together: made ready, opened, whole in part and in all."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.checkpoint import slots
from supervisor.model import Fact, SnapshotCompleted
from supervisor.shared_snapshots import SharedSnapshots
from supervisor.snapshots import Ranks

PART = Ranks(0, here=1, world_size=2, nodes=2, node_rank=1)


@pytest.fixture
def facts() -> list[Fact]:
    return []


@pytest.fixture
def shared(tmp_path: Path, facts: list[Fact]) -> SharedSnapshots:
    for slot in range(3):
        (tmp_path / "slots" / str(slot)).mkdir(parents=True)
    return SharedSnapshots(tmp_path, run_id="run", key=None, fact=facts.append)


def write(shared: SharedSnapshots, slot: int, step: int) -> None:
    assert shared.prepare(slot)
    shared.open(slot)
    folder = shared.folder(slot)
    (folder / ".metadata").write_text("x")
    (folder / "__1_0.distcp").write_text(f"step {step}")
    assert shared.part(1, PART, step=step, slot=slot, seconds=0.1, size=7, metrics={})


def whole(shared: SharedSnapshots, step: int) -> None:
    shared.tell_whole(SnapshotCompleted(time=1.0, attempt=0, step=step, seconds=0.1, bytes=14))


def test_a_slot_is_offered_once_every_node_is_ready(shared: SharedSnapshots) -> None:
    assert shared.offer() is None
    assert shared.prepare(1)
    assert shared.offer() is None
    shared.open(2)
    assert shared.offer() is None, "it was another one"
    shared.open(1)
    assert shared.offer() == 1


def test_a_part_is_no_snapshot_until_all_are_there(shared: SharedSnapshots, facts: list[Fact]) -> None:
    write(shared, 0, 5)
    assert [(held.step, held.slot, held.node_rank, held.nodes) for held in shared.held] == [(5, 0, 1, 2)]
    assert shared.newest() is None
    assert not facts
    assert shared.last_part(5).slot == 0
    whole(shared, 5)
    newest = shared.newest()
    assert newest is not None
    assert newest[1].step == 5
    assert [type(fact) for fact in facts] == [SnapshotCompleted]
    assert shared.newest_part(2) == (0, 5)
    assert shared.newest_part(3) is None


def test_the_next_slot_is_none_that_is_wanted(shared: SharedSnapshots) -> None:
    write(shared, 0, 5)
    whole(shared, 5)
    write(shared, 1, 6)
    whole(shared, 6)
    assert shared.next_slot(None) == 2, "an empty one first"
    assert shared.next_slot(2) == 0
    assert shared.next_slot(None, failed=2) == 0
    shared.copying = (0, 5)
    assert shared.next_slot(2) is None
    assert shared.next_slot(None, failed=2) == 2, "there is no other"
    shared.copying = None
    shared.hold(shared.folder(0))
    assert shared.next_slot(2) is None


def test_a_part_that_is_made_durable_is_not_written_over(shared: SharedSnapshots) -> None:
    write(shared, 0, 5)
    shared.work_on((0, 5))
    assert not shared.prepare(0)
    shared.work_on(None)
    assert shared.prepare(0)
    assert shared.held == ()


def test_parts_move_to_where_the_leader_has_its_own(shared: SharedSnapshots) -> None:
    write(shared, 0, 5)
    write(shared, 1, 6)
    assert shared.move((0, 5), 1)
    assert {held.step: held.slot for held in shared.held} == {5: 1, 6: 0}
    assert (shared.folder(1) / "__1_0.distcp").read_text() == "step 5"
    record = slots.read_slot(shared.folder(0))
    assert record is not None
    assert record.step == 6
    assert not shared.move((0, 7), 1)
    assert shared.find((0, 5), (0, 2)) is None, "another node's part"


def test_a_whole_that_was_put_together_lasts_until_there_is_a_newer_one(
    shared: SharedSnapshots, tmp_path: Path
) -> None:
    gone: list[bool] = []
    folder = tmp_path / "assembled"
    folder.mkdir()
    (folder / ".metadata").touch()
    record = slots.write_slot(folder, slots.SlotRecord(step=4, attempt=0, world_size=2, created=1.0))
    shared.use(folder, record, lambda: gone.append(True))
    assert shared.newest() == (folder, record)
    write(shared, 0, 5)
    shared.hold(folder)
    whole(shared, 5)
    assert not gone, "it is being drained"
    shared.hold(None)
    write(shared, 1, 6)
    whole(shared, 6)
    assert gone
