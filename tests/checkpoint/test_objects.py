"""Drains to and fetches from a real S3 server through a proxy that fails as servers and networks do.

Every fault ends in one of two ways: the checkpoint is there and whole, or it is not listed and a StorageError came within
the limits. ``TIMEOUT`` stands for the half minute of a real run.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import obstore
import pytest
from obstore.store import MemoryStore

from supervisor.checkpoint import bucket
from supervisor.checkpoint.abandoned import abort_uploads
from supervisor.checkpoint.bucket import Limits, connect
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import MANIFEST_NAME, PARTIAL_NAME, Manifest
from supervisor.checkpoint.objects import ObjectStorage
from supervisor.checkpoint.storage import Owner
from supervisor.errors import CancelledError, ConfigError, EverstepError, StorageError
from tests.checkpoint.tools import origin, write_source
from tests.stores.fixtures import ON_EVERY_CLOUD, WITH_S3
from tests.stores.proxy import Fault, Proxy

pytestmark = WITH_S3

TIMEOUT = 2.0
LIMITS = Limits(timeout=TIMEOUT, first_wait=0.05)
MANIFEST = rb"PUT \S+/everstep\.json(\?| |$)"
PARTS = rb"partNumber=|comp=block&"


@pytest.fixture
def storage(reached: Proxy, url: str) -> ObjectStorage:
    where = Remote(url)
    return ObjectStorage(connect(where, LIMITS), where, None, LIMITS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_source(tmp_path / "slot", seed=1)
    (folder / "__2_0.distcp").write_bytes(os.urandom(17 << 20))  # three parts
    return folder


def is_whole(storage: ObjectStorage, step: int) -> bool:
    """Whether it is listed; it must then be right to the last byte, and nothing else is listed."""
    records = storage.records()
    assert [record.problem for record in records] == [None] * len(records)
    assert [record.step for record in records] in ([], [step])
    assert [problem for record in records for problem in storage.verify(record)] == []
    return bool(records)


@ON_EVERY_CLOUD
@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=503, times=3),
        Fault("status", status=500, only=PARTS, times=2),
        Fault("reset", times=4),
        Fault("reset", only=PARTS, times=2),
        Fault("cut", only=PARTS, times=2),
        Fault("hang", only=PARTS, times=1),
        Fault("status", only=MANIFEST, times=3),
        Fault("reset", only=MANIFEST, times=2),
        Fault("deaf", only=MANIFEST, times=1),
        Fault("deaf", only=rb"PUT \S+partial", times=1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.only.decode()[:12]}",
)
def test_a_passing_fault_is_survived(
    storage: ObjectStorage, source: Path, reached: Proxy, fault: Fault
) -> None:
    where = storage.where
    assert isinstance(where, Remote)
    # a busy machine may take longer for an answer than what is waited for where there is none
    limits = Limits(timeout=TIMEOUT if fault.kind == "hang" else 20, first_wait=0.05, patience=30, attempts=8)
    patient = ObjectStorage(connect(where, limits), where, None, limits)
    reached.set(replace(fault, seen=threading.Event()))
    patient.drain(source, origin(7))
    assert is_whole(patient, 7)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status"),
        Fault("reset"),
        Fault("hang"),
        Fault("hang", only=PARTS),
        Fault("status", only=MANIFEST),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.only.decode()[:12]}",
)
def test_an_outage_ends_in_an_error_in_time_and_the_next_drain_goes_through(
    storage: ObjectStorage, source: Path, reached: Proxy, fault: Fault
) -> None:
    reached.set(replace(fault, seen=threading.Event()))
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        storage.drain(source, origin(7))
    assert time.monotonic() - started < 12 * TIMEOUT
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    reached.set(None)
    assert not is_whole(storage, 7)
    storage.drain(source, origin(7))
    assert is_whole(storage, 7)


def test_the_drain_waits_for_a_store_that_comes_back(
    storage: ObjectStorage, source: Path, reached: Proxy
) -> None:
    """An outage shorter than what is waited for costs nothing but time."""
    outage = Fault("status", status=503)
    reached.set(outage)
    with ThreadPoolExecutor(1) as pool:
        drain = pool.submit(storage.drain, source, origin(7))
        assert outage.seen.wait(10)
        reached.set(None)
        drain.result(30)
    assert is_whole(storage, 7)


def test_a_slow_server_is_waited_for(storage: ObjectStorage, source: Path, reached: Proxy) -> None:
    reached.set(Fault("slow", rate=60e6))
    storage.drain(source, origin(7))
    assert is_whole(storage, 7)


@pytest.mark.parametrize("kind", ["hang", "slow"])
def test_a_drain_is_cancelled_at_once_whatever_the_server_does(
    storage: ObjectStorage, source: Path, reached: Proxy, kind: str, tmp_path: Path
) -> None:
    fault = Fault(kind, only=PARTS, rate=1e5)
    reached.set(fault)
    with ThreadPoolExecutor(1) as pool:
        drain = pool.submit(storage.drain, source, origin(7), cancelled=fault.seen.is_set)
        assert fault.seen.wait(10)
        started = time.monotonic()
        with pytest.raises(CancelledError):
            drain.result(30)
        assert time.monotonic() - started < 4
    reached.set(None)
    assert not is_whole(storage, 7)


@ON_EVERY_CLOUD
def test_what_was_asked_of_the_server_before_a_drain_was_cancelled_does_not_stay_behind(
    storage: ObjectStorage, source: Path, reached: Proxy
) -> None:
    """The server carries out a request whether its client still waits for the answer or not."""
    where = storage.where
    assert isinstance(where, Remote)
    limits = Limits(timeout=20, settling=20)  # a busy machine takes longer than a second
    patient = ObjectStorage(connect(where, limits), where, None, limits)
    late = Fault("late", only=rb"PUT \S+__0_0")
    reached.set(late)

    def cancelled() -> bool:
        if late.seen.is_set():
            late.let_go.set()
        return late.seen.is_set()

    with pytest.raises(CancelledError):
        patient.drain(source, origin(7), cancelled=cancelled)
    assert late.answered.wait(10)
    reached.set(None)
    left = obstore.list(connect(where, limits)).collect()
    assert [entry["path"] for entry in left] == [f"step-000000007/{PARTIAL_NAME}"]


@ON_EVERY_CLOUD
def test_what_a_killed_drain_left_is_swept_by_its_owner_only(
    storage: ObjectStorage, source: Path, reached: Proxy
) -> None:
    fault = Fault("hang", only=MANIFEST)
    reached.set(fault)
    where = storage.where
    assert isinstance(where, Remote)
    patient = Limits(
        timeout=20
    )  # so that it ends by the cancellation, and cleans up as little as a killed one
    killed = ObjectStorage(connect(where, patient), where, None, patient)
    with ThreadPoolExecutor(1) as pool:
        drain = pool.submit(killed.drain, source, origin(7, epoch=3), cancelled=fault.seen.is_set)
        with pytest.raises(CancelledError):
            drain.result(30)
    reached.set(None)
    assert not is_whole(storage, 7)
    assert storage.sweep(Owner("another-run", 9)) == []
    assert storage.sweep(Owner("run-1", 2)) == []  # an older supervisor of the job
    assert storage.sweep(Owner("run-1", 4)) == [storage.where / "step-000000007"]
    assert storage.sweep(Owner("run-1", 4)) == []


def uploads(where: Remote) -> list[str]:
    """The uploads in parts that have begun and not ended below ``where``, as the server lists them."""
    found: list[str] = []

    def note(name: str) -> bool:
        found.append(name)
        return False

    abort_uploads(where, note, timeout=10)
    return found


def test_the_parts_of_a_killed_upload_are_given_back_at_the_next_start(
    storage: ObjectStorage, source: Path, reached: Proxy
) -> None:
    fault = Fault("hang", only=rb"partNumber=2")
    reached.set(fault)
    where = storage.where
    assert isinstance(where, Remote)
    patient = Limits(timeout=20)
    killed = ObjectStorage(connect(where, patient), where, None, patient)
    with ThreadPoolExecutor(1) as pool:
        drain = pool.submit(killed.drain, source, origin(7), cancelled=fault.seen.is_set)
        with pytest.raises(CancelledError):
            drain.result(30)
    reached.set(None)
    assert uploads(where) == ["step-000000007/__2_0.distcp"]
    storage.sweep(Owner("another-run", 1))  # whose prefix it shares by mistake
    assert uploads(where) == ["step-000000007/__2_0.distcp"]
    storage.sweep(Owner("run-1", 1))
    assert uploads(where) == []


@ON_EVERY_CLOUD
def test_two_writers_of_the_same_step(storage: ObjectStorage, tmp_path: Path) -> None:
    """Of two jobs that share a prefix by mistake, one goes on; the other is told. Nothing is mixed."""
    sources = [write_source(tmp_path / str(seed), seed=seed, size=1 << 20) for seed in range(4)]
    start = threading.Barrier(4)

    def write(number: int) -> Manifest | EverstepError:
        start.wait(10)
        try:
            return storage.drain(sources[number], origin(7, run_id=f"run-{number}"))
        except StorageError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(write, range(4)))
    assert is_whole(storage, 7)
    kept = storage.records()[0].manifest
    assert [result for result in results if result == kept] == [kept]
    assert all("another job" in str(result) for result in results if result != kept)


@ON_EVERY_CLOUD
def test_a_newer_supervisor_takes_over_and_the_older_one_gives_up(
    storage: ObjectStorage, source: Path, reached: Proxy, tmp_path: Path
) -> None:
    """The older one hangs before its commit, the newer one commits the same step, then the older one wakes."""
    patient = Limits(timeout=20)
    where = storage.where
    assert isinstance(where, Remote)
    old = ObjectStorage(connect(where, patient), where, None, patient)
    newer = write_source(tmp_path / "newer", seed=9)
    fenced = threading.Event()
    go = threading.Event()
    asked: list[int] = []

    def fence() -> None:
        asked.append(1)
        if len(asked) == 6:  # before its commit: all its files are there
            fenced.set()
            go.wait(20)

    with ThreadPoolExecutor(1) as pool:
        drain = pool.submit(old.drain, source, origin(7, epoch=1), fence=fence)
        assert fenced.wait(20)
        manifest = storage.drain(newer, origin(7, epoch=2))
        go.set()
        with pytest.raises(StorageError, match="taken over"):
            drain.result(20)
    assert is_whole(storage, 7)
    assert storage.records()[0].manifest == manifest


@ON_EVERY_CLOUD
def test_a_fetch_survives_passing_faults_and_leaves_no_doubt(
    storage: ObjectStorage, source: Path, reached: Proxy, tmp_path: Path
) -> None:
    storage.drain(source, origin(7))
    (record,) = storage.records()
    for number, fault in enumerate(
        [Fault("status", times=3), Fault("reset", times=3), Fault("hang", times=1)]
    ):
        reached.set(fault)
        folder = storage.fetch(record, tmp_path / f"into-{number}")
        assert (folder / "__2_0.distcp").read_bytes() == (source / "__2_0.distcp").read_bytes()


def test_a_fetch_ends_when_it_is_told_to(
    storage: ObjectStorage, source: Path, reached: Proxy, tmp_path: Path
) -> None:
    storage.drain(source, origin(7))
    (record,) = storage.records()
    fault = Fault("hang")
    reached.set(fault)
    started = time.monotonic()
    with pytest.raises(CancelledError):
        storage.fetch(record, tmp_path / "into", cancelled=fault.seen.is_set)
    assert time.monotonic() - started < 3


def test_an_aborted_upload_leaves_no_parts_when_the_server_answers(
    storage: ObjectStorage, source: Path, reached: Proxy
) -> None:
    reached.set(Fault("status", only=rb"partNumber=3"))
    with pytest.raises(StorageError):
        storage.drain(source, origin(7))
    begun = sum("uploads" in request for request in reached.requests if request.startswith("POST"))
    aborted = sum("uploadId" in request for request in reached.requests if request.startswith("DELETE"))
    assert begun == aborted > 0


@pytest.mark.parametrize("fault", [Fault("hang"), Fault("status"), Fault("reset")], ids=lambda f: f.kind)
def test_the_probe_is_quick_to_refuse(storage: ObjectStorage, reached: Proxy, fault: Fault) -> None:
    reached.set(replace(fault, seen=threading.Event()))
    started = time.monotonic()
    with pytest.raises(ConfigError, match="cannot be used|no answer"):
        storage.sweep(Owner("run-1", 1))
    assert time.monotonic() - started < 5 * TIMEOUT


def test_a_store_that_overwrites_what_it_should_create_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some servers ignore If-None-Match (rclone's does): two writers could not be told apart there."""
    store, put = MemoryStore(), obstore.put_async

    async def careless(*arguments: object, mode: str, **words: object) -> object:
        return await put(*arguments, mode="overwrite", **words)  # type: ignore[arg-type]

    monkeypatch.setattr(bucket.obstore, "put_async", careless)
    with pytest.raises(ConfigError, match="If-None-Match"):
        ObjectStorage(store, Remote("memory://x"), None, LIMITS).sweep(Owner("run-1", 1))


@ON_EVERY_CLOUD
def test_the_manifest_is_put_last(storage: ObjectStorage, source: Path, reached: Proxy) -> None:
    storage.drain(source, origin(7))
    written = [request for request in reached.requests if request.startswith("PUT")]
    assert PARTIAL_NAME in written[0]
    assert f"/{MANIFEST_NAME} " in written[-1]


def test_a_removal_begins_with_the_manifest_and_ends_with_the_marker(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    delete = obstore.delete_async

    async def recording(store: MemoryStore, name: str) -> None:
        removed.append(name.rpartition("/")[2])
        await delete(store, name)

    storage = ObjectStorage(MemoryStore(), Remote("memory://x"), None, LIMITS)
    storage.drain(source, origin(7))
    (record,) = storage.records()
    monkeypatch.setattr(bucket.obstore, "delete_async", recording)
    storage.remove(record)
    assert removed[0] == MANIFEST_NAME
    assert removed[-1] == PARTIAL_NAME
    assert set(removed[1:-1]) == set(record.manifest.files)  # type: ignore[union-attr]
