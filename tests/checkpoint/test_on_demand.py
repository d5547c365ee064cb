"""A checkpoint that is compared piece by piece as it is read. What every place must do is in ``test_storage``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from blake3 import blake3

from supervisor.checkpoint import pieces
from supervisor.checkpoint.catalog import step_directory
from supervisor.checkpoint.commit import drain
from supervisor.checkpoint.manifest import MANIFEST_NAME, FileEntry, Key, Manifest, encode, read_manifest
from supervisor.checkpoint.on_demand import OnDemand
from supervisor.checkpoint.pieces import Piece
from supervisor.checkpoint.storage import LocalStorage
from supervisor.checkpoint.verify import Hasher, UnreadableError, hash_file
from supervisor.errors import CheckpointError
from tests.checkpoint.tools import flip_bit, origin, write_source

KEY = Key.derive("secret")
LARGE = "__0_0.distcp"
DEADLINE = 30


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pieces, "SMALLEST", 1000)
    return write_source(tmp_path / "source", size=2500)


def committed(source: Path, key: Key | None = None) -> tuple[LocalStorage, Path]:
    storage = LocalStorage(source.parent / "checkpoints", key)
    storage.drain(source, origin(3))
    return storage, step_directory(storage.where, 3)


def test_every_piece_has_the_digest_of_its_bytes(source: Path) -> None:
    _, path = committed(source)
    entry, data = read_manifest(path, None).files[LARGE], (source / LARGE).read_bytes()
    assert [(one.start, one.length) for one in entry.cut(LARGE)] == [(0, 1000), (1000, 1000), (2000, 500)]
    for one in entry.cut(LARGE):
        assert one.blake3 == blake3(data[one.start : one.start + one.length]).hexdigest()
    assert entry.blake3 == blake3(b"".join(map(bytes.fromhex, entry.pieces))).hexdigest()


@pytest.mark.parametrize("step", [1, 7, 999, 1000, 1001, 2500])
def test_it_does_not_matter_how_the_bytes_come(source: Path, step: int) -> None:
    data = memoryview((source / LARGE).read_bytes())
    hasher = Hasher(KEY, len(data))
    for start in range(0, len(data), step):
        hasher.update(data[start : start + step])
    assert hasher.entry(len(data)) == hash_file(source / LARGE, KEY)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
def test_bytes_that_nobody_needs_may_be_wrong_and_no_others(source: Path, key: Key | None) -> None:
    storage, path = committed(source, key)
    flip_bit(path / LARGE, 1000)
    found = storage.on_demand(storage.records()[0], path)
    found.need({LARGE: [(0, 1000), (2000, 500)], "__1_0.distcp": [(5, 1)]})
    for wanted in ((999, 2), (1500, 1), (1999, 2)):
        found = storage.on_demand(storage.records()[0], path)
        with pytest.raises(CheckpointError, match=rf"^{LARGE}: digest does not match"):
            found.need({LARGE: [wanted]})


def test_another_files_pieces_are_not_taken_for_its_own(source: Path) -> None:
    storage, path = committed(source)
    other = (path / "__1_0.distcp").read_bytes()
    (path / LARGE).write_bytes(other[:2500])
    for start in (0, 1000, 2000):
        found = storage.on_demand(storage.records()[0], path)
        with pytest.raises(CheckpointError, match="digest does not match"):
            found.need({LARGE: [(start, 1)]})


def test_a_manifest_of_version_1_has_one_digest_for_each_file(source: Path) -> None:
    storage, path = committed(source, KEY)
    manifest = read_manifest(path, KEY)

    def whole(name: str) -> FileEntry:
        data = (path / name).read_bytes()
        return FileEntry(bytes=len(data), blake3=blake3(data, key=KEY.files).hexdigest())

    old = Manifest(origin=manifest.origin, files={name: whole(name) for name in manifest.files}, version=1)
    (path / MANIFEST_NAME).write_bytes(encode(old, KEY))
    record = storage.records()[0]
    assert storage.verify(record) == []
    assert drain(source, path, origin(3), key=KEY).version == 1, "it is good, so it is not written again"
    storage.on_demand(record, path).need({LARGE: [(0, 1)]})
    with pytest.raises(CheckpointError, match=f"{LARGE} has only 2500 bytes"):
        storage.on_demand(record, path).need({LARGE: [(2500, 1)]})
    flip_bit(path / LARGE, 2400)
    assert storage.verify(record) == [f"{LARGE}: digest does not match"]
    with pytest.raises(CheckpointError, match="digest does not match"):
        storage.on_demand(record, path).need({LARGE: [(0, 1)]})


def test_a_file_that_cannot_be_read_is_told_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, path = committed(source)
    found = storage.on_demand(storage.records()[0], path)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("supervisor.edge.files.LocalFiles.open", refuse)
    with pytest.raises(UnreadableError, match=f"{LARGE}: cannot be read: Permission denied"):
        found.need({LARGE: [(0, 1)]})


def test_what_several_want_at_once_is_obtained_once(source: Path) -> None:
    _, path = committed(source)
    manifest = read_manifest(path, None)
    obtained: list[Piece] = []
    entered, go_on = threading.Event(), threading.Event()

    def obtain(wanted: Sequence[Piece], over: Callable[[], bool]) -> None:
        obtained.extend(wanted)
        if any(piece.name == LARGE for piece in wanted):
            entered.set()
            assert go_on.wait(DEADLINE)

    found = OnDemand(path, manifest, obtain)
    threads = [threading.Thread(target=found.need, args=({LARGE: [(0, 1500)]},)) for _ in range(4)]
    threads[0].start()
    assert entered.wait(DEADLINE)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(DEADLINE)
    found.need({LARGE: [(0, 2500)], ".metadata": [(0, 1)]})
    assert [(piece.name, piece.start) for piece in obtained] == [
        (".metadata", 0), (LARGE, 0), (LARGE, 1000), (LARGE, 2000),
    ]  # fmt: skip
    assert found.bytes == manifest.files[".metadata"].bytes + 2500
