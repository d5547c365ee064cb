"""Slots of RAM snapshots: which is offered, what counts as whole, and what a failure on one rank or on all does."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.model import Fact
from supervisor.snapshots import Snapshots


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    facts: list[Fact] = []
    return Snapshots(tmp_path / "runtime", run_id="run", key=None, fact=facts.append)


def write(snapshots: Snapshots, rank: int, step: int, slot: int) -> bool:
    folder = snapshots._slots[slot]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".metadata").touch()
    (folder / f"__{rank}_0.distcp").write_bytes(b"x")
    return snapshots.part(rank, 2, 0, step=step, slot=slot, seconds=0.1, size=1, metrics={})


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
