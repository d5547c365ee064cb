"""One contract for all places that checkpoints are kept in: a directory, and object stores of three kinds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import obstore
import pytest
from obstore.store import LocalStore, MemoryStore, ObjectStore

from supervisor.checkpoint.bucket import Limits, connect
from supervisor.checkpoint.catalog import step_directory
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import MANIFEST_NAME, METADATA_NAME, PARTIAL_NAME, Key
from supervisor.checkpoint.objects import ObjectStorage
from supervisor.checkpoint.on_demand import OnDemand
from supervisor.checkpoint.storage import CheckpointStorage, LocalStorage, Owner
from supervisor.checkpoint.verify import verify_directory
from supervisor.errors import CancelledError, CheckpointError, StorageError
from tests.checkpoint.tools import origin, write_source
from tests.stores.fixtures import WITH_S3

KEY = Key.derive("secret")
LIMITS = Limits(timeout=10)
OWNER = Owner("run-1", 1)


@dataclass(frozen=True)
class Place:
    """A storage, and how a test gets at what lies in it."""

    open: Callable[[Key | None], CheckpointStorage]
    names: Callable[[], set[str]]
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], None]
    delete: Callable[[str], None]


def of_objects(store: ObjectStore, where: Remote) -> Place:
    return Place(
        open=lambda key: ObjectStorage(store, where, key, LIMITS),
        names=lambda: {entry["path"] for entry in obstore.list(store).collect()},
        read=lambda name: bytes(obstore.get(store, name).bytes()),
        write=lambda name, data: obstore.put(store, name, data) and None,
        delete=lambda name: obstore.delete(store, name),
    )


def of_directory(folder: Path) -> Place:
    def write(name: str, data: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return Place(
        open=lambda key: LocalStorage(folder, key),
        names=lambda: {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()},
        read=lambda name: (folder / name).read_bytes(),
        write=write,
        delete=lambda name: (folder / name).unlink(),
    )


@pytest.fixture(params=["directory", "memory", "file", pytest.param("s3", marks=WITH_S3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "directory":
        return of_directory(tmp_path / "checkpoints")
    if request.param == "memory":
        return of_objects(MemoryStore(), Remote("memory://checkpoints"))
    if request.param == "file":
        return of_objects(LocalStore(tmp_path / "store", mkdir=True), Remote("file://checkpoints"))
    request.getfixturevalue("reached")
    where = Remote(request.getfixturevalue("url"))
    return of_objects(connect(where, LIMITS), where)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Nested and empty files, and one of several parts."""
    folder = write_source(tmp_path / "slot", seed=1)
    (folder / "nested").mkdir()
    (folder / "nested" / "__2_0.distcp").write_bytes(os.urandom(20 << 20))
    (folder / "empty.distcp").write_bytes(b"")
    return folder


def steps(storage: CheckpointStorage) -> list[int]:
    records = storage.records()
    assert [record.problem for record in records] == [None] * len(records)
    return [record.step for record in records]


def fetched(storage: CheckpointStorage, into: Path) -> dict[str, bytes]:
    record = storage.records()[0]
    folder = storage.fetch(record, into)
    assert record.manifest is not None
    return {name: (folder / name).read_bytes() for name in record.manifest.files}


@pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
def test_what_was_drained_comes_back(place: Place, source: Path, tmp_path: Path, key: Key | None) -> None:
    storage = place.open(key)
    assert storage.records() == []
    manifest = storage.drain(
        source,
        origin(7),
    )
    assert steps(storage) == [7]
    record = storage.records()[0]
    assert record.manifest == manifest
    assert record.bytes == manifest.bytes
    assert record.path == storage.where / "step-000000007"
    assert storage.verify(record) == []
    assert fetched(storage, tmp_path / "into") == {
        name: (source / name).read_bytes() for name in manifest.files
    }
    assert place.names() == {f"step-000000007/{name}" for name in (*manifest.files, MANIFEST_NAME)}


def test_the_same_step_again_is_kept(place: Place, source: Path, tmp_path: Path) -> None:
    storage = place.open(None)
    first = storage.drain(source, origin(7))
    assert storage.drain(write_source(tmp_path / "other", seed=2), origin(7)) == first
    assert steps(storage) == [7]


def test_the_same_step_of_another_run_is_not_taken_for_ones_own(place: Place, source: Path) -> None:
    storage = place.open(None)
    theirs = storage.drain(source, origin(7, run_id="another"))
    if isinstance(storage, LocalStorage):  # it is out of the way, and whole
        ours = storage.drain(source, origin(7))
        assert storage.records()[0].manifest == ours
        aside = storage.where / "step-000000007.aside-1"
        assert verify_directory(aside, None) == theirs
    else:
        with pytest.raises(StorageError, match="another job"):
            storage.drain(source, origin(7))
        assert [record.manifest for record in storage.records()] == [theirs]


def test_newest_first(place: Place, source: Path) -> None:
    storage = place.open(None)
    for step in (5, 20, 10):
        storage.drain(source, origin(step))
    assert steps(storage) == [20, 10, 5]


def test_one_is_found_by_its_name_as_it_is_listed(place: Place, source: Path) -> None:
    storage = place.open(None)
    for step in (5, 20, 10):
        storage.drain(source, origin(step))
    place.write("step-000000030/__0_0.distcp", b"x")  # not ours, or never finished
    place.write("step-000000040/__0_0.distcp", b"x")
    place.write(f"step-000000040/{PARTIAL_NAME}", b"x")
    place.write("other-000000001/everstep.json", b"x")
    place.write("step-000000010/__0_0.distcp", b"x")
    listed = {record.path.name: record for record in storage.records()}
    names = [*(f"step-{step:09d}" for step in (5, 10, 20, 30, 40, 50)), "other-000000001"]
    assert {name: found for name in names if (found := storage.find(name)) is not None} == listed
    assert {name for name, record in listed.items() if record.problem is None} == {
        "step-000000005",
        "step-000000020",
    }


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "no manifest"])
def test_damage_is_found_and_written_over(place: Place, source: Path, tmp_path: Path, damage: str) -> None:
    storage = place.open(None)
    storage.drain(source, origin(7))
    name = f"step-000000007/{MANIFEST_NAME if 'manifest' in damage else '__0_0.distcp'}"
    data = place.read(name)
    if damage in ("delete", "no manifest"):
        place.delete(name)
    else:
        place.write(name, data[:-1] if damage == "truncate" else bytes([data[0] ^ 1]) + data[1:])
    (record,) = storage.records()
    assert (record.problem is None) == (damage == "flip")
    assert storage.verify(record)
    with pytest.raises(CheckpointError):
        storage.fetch(record, tmp_path / "into")
    if damage == "no manifest":  # whose is it?
        return
    storage.drain(source, origin(7))
    assert steps(storage) == [7]
    assert storage.verify(storage.records()[0]) == []


NESTED = "nested/__2_0.distcp"  # of three pieces


def opened(storage: CheckpointStorage, into: Path) -> OnDemand:
    """The newest, where it is to be read if it has to be fetched."""
    into.mkdir()
    record = storage.records()[0]
    return storage.on_demand(record, record.path if isinstance(record.path, Path) else into)


@pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
def test_what_is_asked_for_is_there_and_no_more(
    place: Place, source: Path, tmp_path: Path, key: Key | None
) -> None:
    storage = place.open(key)
    manifest = storage.drain(source, origin(7))
    found = opened(storage, tmp_path / "into")
    assert (found.path / METADATA_NAME).read_bytes() == (source / METADATA_NAME).read_bytes()
    found.need({NESTED: [(9 << 20, 1 << 20)], "__1_0.distcp": [(0, 1)], "empty.distcp": []})
    data = (found.path / NESTED).read_bytes()
    assert len(data) == 20 << 20
    assert data[8 << 20 : 16 << 20] == (source / NESTED).read_bytes()[8 << 20 : 16 << 20]
    assert (found.path / "__1_0.distcp").read_bytes() == (source / "__1_0.distcp").read_bytes()
    assert found.bytes == (8 << 20) + sum(manifest.files[n].bytes for n in (METADATA_NAME, "__1_0.distcp"))
    if not isinstance(storage, LocalStorage):
        assert not any(data[: 8 << 20]), "not fetched"
        assert not any(data[16 << 20 :])
    found.need({name: [(0, entry.bytes)] for name, entry in manifest.files.items()})
    assert found.bytes == manifest.bytes
    for name in manifest.files:
        assert (found.path / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
def test_damage_is_found_by_whom_it_concerns(place: Place, source: Path, tmp_path: Path, damage: str) -> None:
    storage = place.open(None)
    storage.drain(source, origin(7))
    found = opened(storage, tmp_path / "into")
    name = f"step-000000007/{NESTED}"
    data = place.read(name)
    if damage == "flip":
        place.write(name, data[: 9 << 20] + bytes([data[9 << 20] ^ 1]) + data[(9 << 20) + 1 :])
    elif damage == "truncate":
        place.write(name, data[: 9 << 20])
    elif damage == "swap":
        place.write(name, data[8 << 20 :] + data[: 8 << 20])
    else:
        place.delete(name)
    found.need({"__1_0.distcp": [(0, 10)]})
    with pytest.raises(CheckpointError, match=NESTED):
        found.need({NESTED: [(10 << 20, 1)]})


def test_a_damaged_index_is_found_at_once(place: Place, source: Path, tmp_path: Path) -> None:
    storage = place.open(None)
    storage.drain(source, origin(7))
    data = place.read(f"step-000000007/{METADATA_NAME}")
    place.write(f"step-000000007/{METADATA_NAME}", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"\.metadata: digest does not match"):
        opened(storage, tmp_path / "into")


def test_nothing_is_read_for_whom_it_is_over(place: Place, source: Path, tmp_path: Path) -> None:
    storage = place.open(None)
    storage.drain(source, origin(7))
    found = opened(storage, tmp_path / "into")
    with pytest.raises(CheckpointError, match=r"other\.distcp is not among the files"):
        found.need({"other.distcp": [(0, 1)]})
    found = opened(storage, tmp_path / "again")
    found.close()
    with pytest.raises(CancelledError):
        found.need({NESTED: [(0, 20 << 20)]})


def test_a_removal_takes_all_of_it(place: Place, source: Path) -> None:
    storage = place.open(None)
    storage.drain(source, origin(7))
    storage.drain(source, origin(8))
    record = storage.records()[1]
    storage.remove(record)
    storage.remove(record)  # gone already is fine
    assert steps(storage) == [8]
    assert all(name.startswith("step-000000008/") for name in place.names())


def test_a_cancelled_drain_leaves_nothing(place: Place, source: Path) -> None:
    storage = place.open(None)
    storage.drain(source, origin(7))
    before = place.names()
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 1

    with pytest.raises(CancelledError):
        storage.drain(source, origin(8), cancelled=cancelled, bandwidth=4e6)
    # an object store keeps the marker until the next start, and may yet carry out what it had been asked before
    if left := place.names() - before:
        assert f"step-000000008/{PARTIAL_NAME}" in left
        assert all(name.startswith("step-000000008/") for name in left)
    assert steps(storage) == [7]
    storage.sweep(OWNER)
    assert place.names() == before


def test_a_fence_stops_it_before_the_commit(place: Place, source: Path) -> None:
    storage = place.open(None)
    asked: list[int] = []

    def fence() -> None:
        asked.append(1)
        if len(asked) > 5:
            raise StorageError("a newer supervisor owns the job")

    with pytest.raises(StorageError, match="newer supervisor"):
        storage.drain(source, origin(7), fence=fence)
    assert storage.records() == []
    assert storage.drain(source, origin(7)).step == 7


def test_a_bandwidth_is_kept_to(place: Place, tmp_path: Path) -> None:
    import time

    source = write_source(tmp_path / "slot", size=1 << 20, ranks=2)
    started = time.monotonic()
    place.open(None).drain(source, origin(7), bandwidth=4e6)
    assert time.monotonic() - started > 0.4  # 2 MiB at 4 MB/s


def test_the_sweep_takes_what_was_never_finished_and_nothing_else(place: Place, source: Path) -> None:
    storage = place.open(None)
    storage.drain(source, origin(7))
    marker = b'{"run_id": "run-1", "epoch": 1, "token": "x"}'
    place.write(f"step-000000008/{PARTIAL_NAME}", marker)
    place.write("step-000000008/__0_0.distcp", b"half")
    place.write("step-000000009/__0_0.distcp", b"somebody's own")
    place.write("notes/readme", b"and this")
    assert storage.sweep(OWNER) == [storage.where / "step-000000008"]
    assert [record.step for record in storage.records()] == [9, 7]
    assert "notes/readme" in place.names()
    assert not any(name.startswith("step-000000008/") for name in place.names())
    assert not any("probe" in name for name in place.names())


def test_nothing_half_written_is_listed(place: Place, source: Path) -> None:
    storage = place.open(None)
    place.write(f"step-000000008/{PARTIAL_NAME}", b'{"run_id": "run-1", "epoch": 1}')
    place.write("step-000000008/.metadata", b"half")
    assert storage.records() == []
    assert storage.drain(source, origin(8)).step == 8  # and it is in nobody's way


def test_no_dcp_checkpoint_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "slot").mkdir()
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        place.open(None).drain(tmp_path / "slot", origin(7))
    assert place.names() == set() if not isinstance(place.open(None), LocalStorage) else True


def test_anothers_key_is_neither_read_nor_overwritten(place: Place, source: Path) -> None:
    place.open(KEY).drain(source, origin(7))
    (record,) = place.open(None).records()
    assert "EVERSTEP_KEY" in (record.problem or "")
    storage = place.open(None)
    if isinstance(storage, LocalStorage):
        storage.drain(source, origin(7))  # sets it aside
    else:
        with pytest.raises(StorageError, match="not overwritten"):
            storage.drain(source, origin(7))
        assert place.open(KEY).verify(record) == []


def test_where_it_lies(place: Place) -> None:
    where = place.open(None).where
    assert str(step_directory(where, 12)) == f"{where}/step-000000012"  # type: ignore[type-var]
