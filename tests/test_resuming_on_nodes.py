"""What several nodes resume from: the same checkpoint on all of them, of which each compares what it reads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from supervisor.checkpoint.bucket import Bucket, Limits
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import Key, Manifest
from supervisor.checkpoint.objects import ObjectStorage
from supervisor.checkpoint.storage import LocalStorage
from supervisor.config import Options
from supervisor.edge import memory
from supervisor.edge.jobdir import JobDirectory
from supervisor.edge.threads import each
from supervisor.errors import CancelledError, CheckpointError, StateMismatchError, StorageError
from supervisor.finder import Finder
from supervisor.fleet import Origin
from supervisor.model import Failure, FailureKind, Tier
from supervisor.record import JobRecord
from supervisor.resume import Resume, Sources, choose
from supervisor.staging import Staging
from supervisor.stores import Stores
from supervisor.training import resuming
from supervisor.training.keeper import Candidate
from tests.checkpoint.tools import flip_bit, origin, write_source

FILE = "__1_0.distcp"
FAILURE = Failure(kind=FailureKind.STORAGE, reason="x", attempt=0, time=0.0)
DEADLINE = 30
GB = 10**9


@pytest.fixture
def shared(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "shared")
    for step in (1, 2, 3, 4):
        storage.drain(write_source(tmp_path / f"source-{step}", seed=step), origin(step))
    return storage


def chosen(tmp_path: Path, *places: Any, **given: Any) -> Resume:
    return choose(Sources(None, places, None, Staging(tmp_path / "run", tmp_path / "job"), nodes=2, **given))


def path_of(storage: LocalStorage, step: int) -> Path:
    return storage.where / f"step-{step:09d}"


# --------------------------------------------------------------------------- the leader


def test_one_attempt_is_lost_to_damage_and_not_one_to_each_damaged_checkpoint(
    shared: LocalStorage, tmp_path: Path
) -> None:
    for step in (2, 3, 4):
        flip_bit(path_of(shared, step) / FILE, 0)
    first = chosen(tmp_path, shared)
    assert (first.step, first.rejected) == (4, ())
    assert first.on_demand is not None
    first.on_demand.need({"__0_0.distcp": [(0, 10)]})
    with pytest.raises(CheckpointError, match=FILE):
        first.on_demand.need({FILE: [(0, 10)]})
    with pytest.raises(CheckpointError, match=FILE):  # nobody waits for what cannot become good any more
        first.on_demand.need({"__0_0.distcp": [(0, 10)]})
    second = chosen(tmp_path, shared, suspicious=True)
    assert second.step == 1
    assert [path for path, _ in second.rejected] == [path_of(shared, step) for step in (4, 3, 2)]


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_index_that_cannot_be_read_is_passed_over(
    nodes: int, shared: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from supervisor.edge.files import LocalFiles

    opened = LocalFiles.open

    def refusing(self: LocalFiles, path: Path, flags: int) -> int:
        if path == path_of(shared, 4) / ".metadata":
            raise OSError(5, "Input/output error")
        return opened(self, path, flags)

    monkeypatch.setattr(LocalFiles, "open", refusing)
    resume = choose(Sources(None, [shared], None, Staging(tmp_path / "run", tmp_path / "job"), nodes=nodes))
    assert resume.step == 3
    assert "cannot be read: Input/output error" in resume.rejected[0][1]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (JobRecord(), False),
        (JobRecord(last_failure=FAILURE, committed_step=5, failure_committed_step=5), True),
        (JobRecord(last_failure=FAILURE, committed_step=9, failure_committed_step=5), False),  # stopped later
    ],
)
def test_a_run_suspects_what_the_one_before_has_failed_behind(
    record: JobRecord, expected: bool, tmp_path: Path
) -> None:
    assert stores(tmp_path, record)._is_suspicious is expected


def test_suspicion_lasts_until_there_is_a_newer_checkpoint(tmp_path: Path) -> None:
    found = stores(tmp_path, JobRecord())
    own = LocalStorage(tmp_path / "job" / "checkpoints")
    for step in (1, 2):
        own.drain(write_source(tmp_path / f"own-{step}", seed=step), origin(step))
    flip_bit(path_of(own, 2) / FILE, 0)
    resumed = []
    for attempt in range(4):
        resume = asyncio.run(found.choose(nodes=2))
        resumed.append(resume.step)
        if resume.step == 2:
            found.doubt(attempt, [path_of(own, 2)])
    assert resumed == [2, 1, 1, 1]
    assert found._is_suspicious
    found.draining.newest_committed = (4, 3)
    assert not found._is_suspicious


def stores(tmp_path: Path, record: JobRecord) -> Stores:
    job = JobDirectory(tmp_path / "job")
    file: Any = SimpleNamespace(runtime=tmp_path / "runtime", run_id="run-1", epoch=1)
    ledger: Any = SimpleNamespace(record=record, add=lambda _fact: None)
    console: Any = SimpleNamespace(say=lambda _text: None)
    options = Options(dir=job.path)
    return Stores(options, job, file, ledger, console)


# --------------------------------------------------------------------------- where it lies


@pytest.fixture
def remote(tmp_path: Path) -> ObjectStorage:
    for folder in ("run", "job"):
        (tmp_path / folder).mkdir()
    storage = ObjectStorage(MemoryStore(), Remote("memory:///ckpt"), None, Limits(timeout=10))
    storage.drain(write_source(tmp_path / "source", size=2500), origin(3))
    return storage


def test_a_fetch_that_nobody_waits_for_leaves_the_next_attempts_files_alone(
    remote: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging(tmp_path / "run", tmp_path / "job")
    sources = Sources(None, [remote], None, staging, nodes=2)
    fetch, entered, go_on, over = Bucket.range, threading.Event(), threading.Event(), threading.Event()
    errors: list[StorageError] = []

    def cut_off() -> None:
        try:
            choose(sources, over.is_set)
        except StorageError as error:
            errors.append(error)

    slow = threading.Thread(target=cut_off)

    async def ranged(self: Bucket, name: str, start: int, length: int) -> memoryview:
        if threading.current_thread() is slow:
            entered.set()
            while not go_on.is_set():
                await asyncio.sleep(0.01)
        return await fetch(self, name, start, length)

    monkeypatch.setattr(Bucket, "range", ranged)
    slow.start()
    assert entered.wait(DEADLINE)
    over.set()  # the attempt has ended
    staging.clear()
    second = choose(sources)
    go_on.set()
    slow.join(DEADLINE)
    assert len(errors) == 1, "cancelled, or its directory was gone"
    assert second.on_demand is not None
    assert second.path is not None
    second.on_demand.need({FILE: [(0, 10)]})
    assert (second.path / FILE).read_bytes() == (tmp_path / "source" / FILE).read_bytes()
    with pytest.raises(CancelledError):
        staging.on_demand(remote, remote.records()[0], 2, over.is_set)
    staging.clear()
    assert not (tmp_path / "run" / "staging").exists()


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_cannot_be_used_leaves_nothing(nodes: int, remote: ObjectStorage, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "run", tmp_path / "job")
    obstore.put(remote._objects._store, f"step-000000003/{FILE}", b"x" * 2501)
    obstore.put(remote._objects._store, "step-000000003/.metadata", b"x" * 100)
    with pytest.raises(CheckpointError, match="none that is whole"):
        choose(Sources(None, [remote], None, staging, nodes=nodes))
    assert not list(tmp_path.glob("*/staging"))


def test_a_manifest_that_cannot_be_read_for_a_moment(
    shared: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from supervisor.checkpoint import catalog

    read, failing = catalog.read_manifest, [path_of(shared, 4)]

    def flaky(path: Path, key: Key | None) -> Manifest:
        if path in failing:
            failing.remove(path)
            raise CheckpointError("everstep.json cannot be read: Stale file handle")
        return read(path, key)

    monkeypatch.setattr(catalog, "read_manifest", flaky)
    staging = Staging(tmp_path / "run", tmp_path / "job")
    assert choose(Sources(None, [shared], None, staging)).step == 4


@pytest.mark.parametrize(
    ("ram", "disk", "size", "expected"),
    [
        (500, 0, 100, "run"),  # beside the snapshots to come
        (499, 100, 100, "job"),
        (300, 60, 100, "run"),  # the disk has not room for all of it
        (60, 60, 100, "job"),  # nor has anything else: as much as each node may need
        (60, 10, 100, "run"),
        (49, 49, 100, None),
    ],
)
def test_room_for_all_of_it_goes_before_room_for_the_nodes_share(
    ram: int, disk: int, size: int, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "room", lambda folder: {"run": ram, "job": disk}[folder.name] * GB)
    staging = Staging(tmp_path / "run", tmp_path / "job")
    if expected is None:
        with pytest.raises(StorageError, match="there is no room to fetch x"):
            staging._room("x", size * GB, size * GB // 2)
    else:
        assert staging._room("x", size * GB, size * GB // 2) == tmp_path / expected / "staging"


def test_room_in_memory_is_what_memory_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    assert memory.room(Path("/dev/shm")) == 1000
    assert memory.room(tmp_path) > 1000


# --------------------------------------------------------------------------- those that follow


def found(tmp_path: Path, shared: LocalStorage, resume: Resume, *, emergency: bool = False) -> Resume:
    options: Any = SimpleNamespace(checkpoints_directory=shared.where, storage_timeout=5)
    job: Any = SimpleNamespace(path=tmp_path / "job")
    unused: Any = None
    staging = Staging(tmp_path / "run-2", tmp_path / "run-2")
    finder = Finder(options, job, None, unused, staging, unused)
    told = Origin(
        attempt=1, step=resume.step, tier=Tier.CHECKPOINT, path=str(resume.kept), emergency=emergency,
        fingerprint=resume.fingerprint,
    )  # fmt: skip
    return finder._checkpoint(told, 2)


def test_a_follower_finds_the_checkpoint_that_the_leader_has_found(
    shared: LocalStorage, tmp_path: Path
) -> None:
    resume = chosen(tmp_path, shared)
    assert found(tmp_path, shared, resume).kept == resume.kept
    refuge = LocalStorage(tmp_path / "job" / "checkpoints")
    refuge.drain(write_source(tmp_path / "source-5", seed=5), origin(5))
    copy = chosen(tmp_path, shared, refuge)
    assert copy.kept == path_of(refuge, 5)
    assert found(tmp_path, shared, copy, emergency=True).kept == copy.kept
    with pytest.raises(StorageError, match="step-000000005, from which the leader resumes, is not seen in"):
        found(tmp_path, shared, copy)


def test_a_follower_refuses_another_checkpoint_of_the_same_name(shared: LocalStorage, tmp_path: Path) -> None:
    resume = chosen(tmp_path, shared)
    shared.remove(shared.records()[0])
    shared.drain(write_source(tmp_path / "source-4", seed=4), origin(4, attempt=3))
    with pytest.raises(StorageError, match="is not on this node what it is on the leader's"):
        found(tmp_path, shared, resume)


# --------------------------------------------------------------------------- what the ranks tell


@pytest.mark.parametrize(
    ("error", "on_demand", "damaged"),
    [
        (CheckpointError("x"), True, True),
        (StorageError("the store does not answer"), True, False),
        (StorageError("x"), False, True),
        (StateMismatchError("x"), True, False),
    ],
)
def test_a_store_that_does_not_answer_is_no_damage(error: Exception, on_demand: bool, damaged: bool) -> None:
    told: list[bool] = []

    def load(*_: object) -> int:
        raise error

    def rejected(_candidate: Candidate, _reason: str, *, damaged: bool) -> bool:
        told.append(damaged)
        return False

    need = (lambda _wanted: None) if on_demand else None
    keeper: Any = SimpleNamespace(candidate=lambda: Candidate(Path("x"), 3, need), rejected=rejected)
    world: Any = SimpleNamespace(gather=lambda value: [value])
    training: Any = SimpleNamespace(load=load)
    with pytest.raises(type(error)):
        resuming.resume(keeper, training, world)
    assert told == [damaged]


@pytest.mark.parametrize(
    ("second", "damaged"), [(CheckpointError, True), (StorageError, False), (StateMismatchError, False)]
)
def test_damage_on_any_rank_is_told_by_all(second: type[Exception], damaged: bool) -> None:
    told: list[bool] = []

    def load(*_: object) -> int:
        raise StorageError("the store does not answer")

    def rejected(_candidate: Candidate, _reason: str, *, damaged: bool) -> bool:
        told.append(damaged)
        return False

    keeper: Any = SimpleNamespace(
        candidate=lambda: Candidate(Path("x"), 3, lambda _wanted: None), rejected=rejected
    )
    world: Any = SimpleNamespace(gather=lambda value: [value, (second, "x")])
    training: Any = SimpleNamespace(load=load)
    with pytest.raises(StorageError):
        resuming.resume(keeper, training, world)
    assert told == [damaged]


# --------------------------------------------------------------------------- threads


def test_each_item_is_done_once_and_the_first_error_ends_it() -> None:
    done: list[int] = []
    each(done.append, range(100), 4)
    assert sorted(done) == list(range(100))
    each(done.append, [], 4)

    def failing(item: int) -> None:
        if item == 5:
            raise ValueError(item)
        done.append(item)

    done.clear()
    with pytest.raises(ValueError, match="5"):
        each(failing, range(10_000), 2)
    assert len(done) < 10_000

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        each(done.append, broken(), 2)


def test_without_a_thread_the_work_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    done: list[int] = []
    each(done.append, range(5), 4)
    assert done == list(range(5))
