"""One contract for checkpoints that several nodes write: in a directory, and in object stores."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest
from obstore.store import LocalStore, MemoryStore, ObjectStore

from supervisor.checkpoint import catalog
from supervisor.checkpoint.bucket import Bucket, Limits, connect
from supervisor.checkpoint.in_parts import Making, PartStorage, finish_left
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import PARTIAL_NAME, Key
from supervisor.checkpoint.objects import ObjectStorage
from supervisor.checkpoint.storage import CheckpointStorage, LocalStorage, Owner
from supervisor.errors import CancelledError, CheckpointError, EverstepError, StorageError
from tests.checkpoint.tools import origin, write_source
from tests.stores.fixtures import WITH_S3
from tests.stores.proxy import Fault, Proxy

STEP = 7
MAKING = Making(step=STEP, attempt=2, epoch=1)
LIMITS = Limits(timeout=2, first_wait=0.05)
NAME = "step-000000007-2-1"


def no_fence() -> None: ...


def never() -> bool:
    return False


def owner(epoch: int = 1) -> Owner:
    return Owner(origin(STEP).run_id, epoch)


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


def of_memory(store: ObjectStore, key: Key | None = None) -> ObjectStorage:
    return ObjectStorage(store, Remote("memory://checkpoints"), key, LIMITS)


@pytest.fixture(params=["directory", "memory", "file", pytest.param("s3", marks=WITH_S3)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Key | None], CheckpointStorage]:
    if request.param == "directory":
        return lambda key: LocalStorage(tmp_path / "checkpoints", key)
    if request.param == "memory":
        store = MemoryStore()
        return lambda key: of_memory(store, key)
    if request.param == "file":
        files = LocalStore(tmp_path / "store", mkdir=True)
        return lambda key: ObjectStorage(files, Remote("file://checkpoints"), key, LIMITS)
    request.getfixturevalue("reached")
    where = Remote(request.getfixturevalue("url"))
    return lambda key: ObjectStorage(connect(where, LIMITS), where, key, LIMITS)


def begin(place: PartStorage, making: Making = MAKING) -> None:
    assert place.begin(making, fence=no_fence, cancelled=never) is None


def drain(
    place: PartStorage, tmp_path: Path, rank: int, making: Making = MAKING, *, seed: int = 0,
    cancelled: Callable[[], bool] = never,
) -> None:  # fmt: skip
    source = write_source(tmp_path / f"source-{seed}", ranks=2, seed=seed)
    names = [f"__{rank}_0.distcp", *([".metadata"] if rank == 0 else [])]
    place.drain_part(source, making, names, rank=rank, nodes=2, origin=origin(STEP), cancelled=cancelled)


def is_whole(storage: CheckpointStorage) -> bool:
    """Whether there is a checkpoint: it is right to the last byte then, and nothing else is listed."""
    records = storage.records()
    assert [record.problem for record in records] == [None] * len(records)
    assert [problem for record in records for problem in storage.verify(record)] == []
    assert [record.step for record in records] in ([], [STEP])
    return bool(records)


@pytest.mark.parametrize("key", [None, Key.derive("s")], ids=["plain", "keyed"])
def test_all_parts_make_a_checkpoint(
    opened: Callable[[Key | None], CheckpointStorage], tmp_path: Path, key: Key | None
) -> None:
    storage = opened(key)
    place = storage.parts(owner())
    begin(place)
    for rank in (1, 0):
        assert not place.is_whole(MAKING)
        with pytest.raises(CheckpointError, match="not all nodes"):
            place.complete(MAKING)
        drain(place, tmp_path, rank)
        assert not is_whole(storage)
    manifest = place.complete(MAKING)
    assert is_whole(storage)
    (record,) = storage.records()
    assert record.manifest == manifest
    assert record.path == (manifest.place or storage.where / f"step-{STEP:09d}")
    assert set(manifest.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    into = storage.fetch(record, tmp_path / "into")
    for name in manifest.files:
        assert (into / name).read_bytes() == (tmp_path / "source-0" / name).read_bytes()
    assert place.left() == []


def test_the_next_run_completes_what_is_whole_and_sweeps_what_is_not(
    opened: Callable[[Key | None], CheckpointStorage], tmp_path: Path
) -> None:
    storage = opened(None)
    place, unfinished = storage.parts(owner()), Making(step=STEP, attempt=1, epoch=1)
    for making, ranks in ((unfinished, (0,)), (MAKING, (0, 1))):
        begin(place, making)
        for rank in ranks:
            drain(place, tmp_path, rank, making)
    assert place.left() == [MAKING, unfinished]
    storage.sweep(owner(2))
    following = storage.parts(owner(2))
    assert finish_left(following, no_fence) == [STEP]
    assert is_whole(storage)
    assert following.left() == []


def test_a_fence_that_refuses_and_a_cancelled_part_leave_nothing_listed(
    opened: Callable[[Key | None], CheckpointStorage], tmp_path: Path
) -> None:
    def fence() -> None:
        raise StorageError("a newer supervisor")

    storage = opened(None)
    place = storage.parts(owner())
    begin(place)
    drain(place, tmp_path, 0)
    with pytest.raises(CancelledError):
        drain(place, tmp_path, 1, cancelled=lambda: True)
    assert not place.is_whole(MAKING)
    drain(place, tmp_path, 1)
    with pytest.raises(StorageError, match="newer"):
        place.complete(MAKING, fence=fence)
    assert not is_whole(storage)
    assert place.complete(MAKING).step == STEP, "the parts are there still"


def test_a_late_node_harms_nothing(opened: Callable[[Key | None], CheckpointStorage], tmp_path: Path) -> None:
    """One of an earlier attempt, with other bytes, and after a new leader has made a checkpoint of the step."""
    storage, late = opened(None), Making(step=STEP, attempt=1, epoch=1)
    begin(storage.parts(owner()), late)
    making = Making(step=STEP, attempt=2, epoch=2)
    place = storage.parts(owner(2))
    begin(place, making)
    drain(place, tmp_path, 0, making)
    drain(place, tmp_path, 1, making)
    place.complete(making)
    drain(storage.parts(owner()), tmp_path, 1, late, seed=5)
    assert is_whole(storage)
    finish_left(place, no_fence)
    assert is_whole(storage)
    assert place.left() == []


def test_a_leader_of_an_earlier_epoch_and_its_nodes_find_out(memory: MemoryStore, tmp_path: Path) -> None:
    storage = of_memory(memory)
    old, new = storage.parts(owner()), storage.parts(owner(2))
    begin(old)
    drain(old, tmp_path, 0)
    drain(old, tmp_path, 1)
    obstore.put(memory, f"{NAME}/{PARTIAL_NAME}", b'{"run_id": "%s", "epoch": 2}' % owner().run_id.encode())
    with pytest.raises(CheckpointError, match="not being written any more"):
        old.complete(MAKING)
    new.discard(MAKING)
    with pytest.raises(CheckpointError, match="not being written any more"):
        drain(old, tmp_path, 1)
    assert list(obstore.list(memory).collect()) == []
    # an upload that was under way all the time
    obstore.put(memory, f"{NAME}/__1_0.distcp", b"late")
    assert storage.records() == []
    assert finish_left(new, no_fence) == []
    assert list(obstore.list(memory).collect()) == []


def test_what_is_another_jobs_is_left_alone(memory: MemoryStore, tmp_path: Path) -> None:
    storage = of_memory(memory)
    place, stranger = storage.parts(owner()), storage.parts(Owner("another", 9))
    begin(place)
    drain(place, tmp_path, 0)
    with pytest.raises(StorageError, match="another job"):
        stranger.begin(MAKING, fence=no_fence, cancelled=never)
    assert storage.sweep(Owner("another", 9)) == []
    assert finish_left(stranger, no_fence) == []
    drain(place, tmp_path, 1)
    place.complete(MAKING)
    assert is_whole(storage)


def test_begun_again_what_was_there_is_removed_and_a_good_one_kept(
    memory: MemoryStore, tmp_path: Path
) -> None:
    storage = of_memory(memory)
    place = storage.parts(owner())
    begin(place)
    drain(place, tmp_path, 0)
    begin(place)
    assert {entry["path"] for entry in obstore.list(memory).collect()} == {f"{NAME}/{PARTIAL_NAME}"}
    for rank in (0, 1):
        drain(place, tmp_path, rank)
    manifest = place.complete(MAKING)
    assert place.begin(MAKING, fence=no_fence, cancelled=never) == manifest
    place.discard(MAKING)
    assert is_whole(storage)


@pytest.mark.parametrize("doing", ["part", "complete", "discard"])
def test_killed_at_every_request_it_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    """A node or the leader dies before each of its requests; the next run finishes the work."""

    class Killed(BaseException):
        pass

    left = [-1]

    def dying(name: str) -> None:
        genuine = getattr(Bucket, name)

        async def request(self: Bucket, *args: object, **how: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            return await genuine(self, *args, **how)

        monkeypatch.setattr(Bucket, name, request)

    for name in ("put", "upload", "get", "sizes", "delete"):
        dying(name)
    for moment in range(100):
        left[0] = -10
        memory = MemoryStore()
        storage = of_memory(memory)
        place = storage.parts(owner())
        begin(place)
        drain(place, tmp_path, 0)
        if doing != "part":
            drain(place, tmp_path, 1)
        left[0] = moment
        try:
            if doing == "part":
                drain(place, tmp_path, 1)
            elif doing == "complete":
                place.complete(MAKING)
            else:
                storage.parts(owner(2)).discard(MAKING)
        except Killed:
            is_whole(storage)
            storage.sweep(owner(3))
            finish_left(storage.parts(owner(3)), no_fence)
            assert is_whole(storage) or doing != "complete"
            assert storage.parts(owner(3)).left() == []
        else:
            left[0] = -10
            assert moment >= 3
            assert is_whole(storage) == (doing == "complete")
            return
    raise AssertionError("it never came to its end")


@WITH_S3
@pytest.mark.parametrize(
    ("only", "doing"), [(rb"PUT \S+distcp", "part"), (rb"PUT \S+/everstep\.json(\?| |$)", "complete")]
)
def test_a_server_that_hangs_is_an_error_in_time_and_later_all_goes_through(
    reached: Proxy, url: str, tmp_path: Path, only: bytes, doing: str
) -> None:
    limits = Limits(timeout=0.5, attempts=1, first_wait=0.05)
    storage = ObjectStorage(connect(Remote(url), limits), Remote(url), None, limits)
    place = storage.parts(owner())
    begin(place)
    drain(place, tmp_path, 0)
    if doing == "complete":
        drain(place, tmp_path, 1)
    reached.set(Fault("hang", only=only, seen=threading.Event()))
    with pytest.raises(EverstepError):
        place.complete(MAKING) if doing == "complete" else drain(place, tmp_path, 1)
    reached.set(None)
    assert not is_whole(storage)
    if doing == "part":
        drain(place, tmp_path, 1)
    place.complete(MAKING)
    assert is_whole(storage)


def test_the_names_of_checkpoints_of_several_nodes() -> None:
    assert catalog.parts_name(7, 2, 1) == NAME
    assert (catalog.step_of(NAME), catalog.parts_named(NAME)) == (7, (7, 2, 1))
    for name in (
        "step-000000007",
        "step-7-2-1",
        "step-000000007-2",
        "step-000000007-02-1",
        "step-0000000007-2-1",
    ):
        assert catalog.parts_named(name) is None
