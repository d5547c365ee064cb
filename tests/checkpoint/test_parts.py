"""A checkpoint that several nodes write: whole by one rename, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.checkpoint import catalog, parts
from supervisor.checkpoint.manifest import Key
from supervisor.checkpoint.parts import Incoming
from supervisor.edge.files import LOCAL, WatchedFiles
from supervisor.errors import CheckpointError, StorageError
from tests.checkpoint.tools import flip_bit, origin, write_source

STEP = 7


@pytest.fixture
def incoming(tmp_path: Path) -> Incoming:
    return Incoming(checkpoints=tmp_path / "checkpoints", step=STEP, attempt=2, epoch=1)


def drain(
    incoming: Incoming, tmp_path: Path, rank: int, nodes: int = 2, key: Key | None = None, seed: int = 0
) -> None:
    source = write_source(tmp_path / "source", ranks=nodes, seed=seed)
    names = [f"__{rank}_0.distcp", *([".metadata"] if rank == 0 else [])]
    parts.drain_part(source, incoming, names, rank=rank, nodes=nodes, origin=origin(STEP), key=key)


@pytest.mark.parametrize("key", [None, Key.derive("s")], ids=["plain", "keyed"])
def test_all_parts_make_a_checkpoint(incoming: Incoming, tmp_path: Path, key: Key | None) -> None:
    for rank in (1, 0):
        assert parts.read_parts(incoming, key) is None
        with pytest.raises(CheckpointError, match="not all nodes"):
            parts.complete(incoming, key=key)
        assert catalog.list_checkpoints(incoming.checkpoints, key) == []
        drain(incoming, tmp_path, rank, key=key)
    manifest = parts.complete(incoming, key=key)
    (record,) = catalog.list_checkpoints(incoming.checkpoints, key)
    assert record.manifest == manifest
    assert catalog.verify(record, key) == []
    assert set(manifest.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert not incoming.path.exists()


def test_a_fence_that_refuses_leaves_nothing(incoming: Incoming, tmp_path: Path) -> None:
    def fence() -> None:
        raise StorageError("a newer supervisor")

    drain(incoming, tmp_path, 0)
    drain(incoming, tmp_path, 1)
    with pytest.raises(StorageError, match="newer"):
        parts.complete(incoming, fence=fence)
    assert catalog.list_checkpoints(incoming.checkpoints) == []
    assert parts.complete(incoming).step == STEP, "the parts are there still"


def test_a_late_part_changes_nothing_of_what_was_committed(incoming: Incoming, tmp_path: Path) -> None:
    for rank in (0, 1):
        drain(incoming, tmp_path, rank)
    parts.complete(incoming)
    drain(incoming, tmp_path, 1, seed=5)
    (record,) = catalog.list_checkpoints(incoming.checkpoints)
    assert catalog.verify(record) == []
    assert parts.left(incoming.checkpoints) == [incoming]
    parts.discard(incoming)
    assert parts.left(incoming.checkpoints) == []


def test_damage_is_noticed(incoming: Incoming, tmp_path: Path) -> None:
    drain(incoming, tmp_path, 0)
    drain(incoming, tmp_path, 1)
    flip_bit(incoming.part(1), 50)
    with pytest.raises(CheckpointError, match="part-1"):
        parts.complete(incoming)
    drain(incoming, tmp_path, 1)
    (incoming.files / "__1_0.distcp").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not what its node has written"):
        parts.complete(incoming)


def test_killed_at_every_moment_it_is_whole_or_not_there(incoming: Incoming, tmp_path: Path) -> None:
    """The leader dies before each of its operations; another one finishes the work."""

    class Killed(BaseException):
        pass

    for moment in range(100):
        count = 0

        def before(name: str, path: Path, moment: int = moment) -> None:
            nonlocal count
            if count == moment:
                raise Killed
            count += 1

        if not incoming.path.exists():
            for record in catalog.list_checkpoints(incoming.checkpoints):
                catalog.remove(record)
            drain(incoming, tmp_path, 0)
            drain(incoming, tmp_path, 1)
        try:
            parts.complete(incoming, files=WatchedFiles(LOCAL, before))
        except Killed:
            for record in catalog.list_checkpoints(incoming.checkpoints):
                assert catalog.verify(record) == []
            if not catalog.list_checkpoints(incoming.checkpoints):
                parts.complete(incoming)
            parts.discard(incoming)
            (record,) = catalog.list_checkpoints(incoming.checkpoints)
            assert catalog.verify(record) == []
        else:
            assert moment > 5
            return
    raise AssertionError("it never came to its end")
