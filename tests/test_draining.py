"""When snapshots are drained: one at a time, the newest, again after a failure, and at the end within the time left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from supervisor.checkpoint import catalog, location
from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.location import Location, Remote
from supervisor.checkpoint.manifest import FileEntry, Manifest, Origin
from supervisor.checkpoint.slots import SlotRecord
from supervisor.checkpoint.storage import LocalStorage, Owner
from supervisor.config import Options
from supervisor.decide.retention import RetentionPolicy
from supervisor.draining import FIRST_WAIT, Draining, Stamp
from supervisor.edge import clock
from supervisor.edge.jobdir import JobDirectory
from supervisor.errors import CancelledError, StorageError
from supervisor.model import CheckpointCommitted, CheckpointFailed, Fact
from supervisor.stores import refuge
from tests.checkpoint.tools import write_source

DEADLINE = 20.0


class Slots:
    """Snapshots by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_source(folder)
        self.step = 0
        self.failure: str | None = None
        self.held: list[Path | None] = []

    def newest(self) -> tuple[Path, SlotRecord] | None:
        if not self.step:
            return None
        return self.folder, SlotRecord(step=self.step, attempt=0, world_size=2, created=1.0)

    def hold(self, path: Path | None) -> None:
        self.held.append(path)


class Scripted:
    """An object store that takes a checkpoint when it is let, and fails or hangs on request."""

    def __init__(self) -> None:
        self.where: Location = Remote("s3://bucket/run")
        self.fails = self.hangs = False
        self.breaks: Exception | None = None
        self.begun = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.steps: list[int] = []
        self.at_once = self.most_at_once = 0
        self.bandwidths: list[float | None] = []

    def records(self) -> list[CheckpointRecord]:
        return [CheckpointRecord(step=step, path=self.where / f"step-{step:09d}") for step in self.steps]

    def verify(self, record: CheckpointRecord) -> list[str]:
        return []

    def drain(
        self,
        source: Path,
        origin: Origin,
        *,
        fence: Callable[[], None] = lambda: None,
        bandwidth: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Manifest:
        self.bandwidths.append(bandwidth)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.begun.set()
        try:
            assert self.go.wait(DEADLINE)
            if self.hangs:  # deaf to everything, as a thread in a dead NFS is
                threading.Event().wait(DEADLINE)
            if cancelled():
                raise CancelledError("cancelled")
            if self.breaks is not None:
                raise self.breaks
            if self.fails:
                raise StorageError("503 Service Unavailable")
            self.steps.append(origin.step)
            return Manifest(origin=origin, files={".metadata": FileEntry(bytes=1, blake3="0" * 64)})
        finally:
            self.at_once -= 1

    def fetch(
        self, record: CheckpointRecord, into: Path, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Path:
        raise AssertionError

    def remove(self, record: CheckpointRecord) -> None:
        self.steps.remove(record.step)

    def set_aside(self, records: Sequence[CheckpointRecord]) -> Location | None:
        raise AssertionError

    def sweep(self, owner: Owner) -> list[Location]:
        return []


class Bench:
    """A Draining with all that it needs."""

    def __init__(self, tmp_path: Path, *, refuge: bool = True, grace: float = 5.0) -> None:
        self.slots, self.storage = Slots(tmp_path / "slot"), Scripted()
        self.facts: list[Fact] = []
        self.said: list[str] = []
        self.refuge = LocalStorage(tmp_path / "job" / "checkpoints") if refuge else None
        self.draining = Draining(
            self.slots,
            self.storage,
            self.refuge,
            stamp=Stamp("run-1", 1, {}),
            policy=RetentionPolicy(keep_last=2),
            bandwidth=1e6,
            grace=grace,
            fence=lambda: None,
            fact=self.facts.append,
            report=self.said.append,
        )

    def snapshot(self, step: int) -> None:
        self.slots.step = step

    async def until(self, found: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not found():
                await asyncio.sleep(0.005)

    def failures(self) -> list[int]:
        return [fact.step for fact in self.facts if isinstance(fact, CheckpointFailed)]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_one_is_in_flight_and_the_newest_wins(bench: Bench) -> None:
    async def work() -> None:
        bench.storage.go.clear()
        bench.snapshot(5)
        bench.draining.drain()
        await bench.until(bench.storage.begun.is_set)
        assert bench.slots.held == [bench.slots.folder]
        for step in (10, 15, 20):
            bench.snapshot(step)
            bench.draining.drain()
        bench.storage.go.set()
        await bench.until(lambda: not bench.draining.is_draining)

    run(work())
    assert bench.storage.steps == [5, 20]
    assert bench.storage.most_at_once == 1
    assert bench.slots.held[-1] is None
    assert bench.draining.is_durable(20)
    assert bench.storage.bandwidths == [1e6, 1e6]


def test_a_failed_drain_is_begun_again_with_a_later_snapshot(bench: Bench) -> None:
    async def work() -> None:
        bench.draining.retry(clock.monotonic())  # nothing has failed
        assert not bench.draining.is_draining
        bench.storage.fails = True
        for step in (5, 10):
            bench.snapshot(step)
            bench.draining.drain()
            await bench.until(lambda: not bench.draining.is_draining)
        assert bench.failures() == [5, 10]
        assert bench.draining.failure == "503 Service Unavailable"
        bench.snapshot(15)
        now = clock.monotonic()
        bench.draining.retry(now + FIRST_WAIT)  # the second wait is twice as long
        assert not bench.draining.is_draining
        bench.storage.fails = False
        bench.draining.retry(now + 2 * FIRST_WAIT)
        await bench.until(lambda: not bench.draining.is_draining)
        bench.snapshot(20)
        bench.draining.retry(now + 100)  # it has succeeded: the next one comes when it is due
        assert not bench.draining.is_draining

    run(work())
    assert bench.storage.steps == [15]
    assert bench.draining.failure is None


def test_a_drain_that_finds_no_thread_fails_as_any_other(bench: Bench) -> None:
    async def work() -> None:
        bench.storage.breaks = RuntimeError("can't start new thread")
        bench.snapshot(5)
        bench.draining.drain()
        await bench.until(lambda: not bench.draining.is_draining)
        assert bench.failures() == [5]
        assert bench.draining.failure == "RuntimeError: can't start new thread"
        bench.storage.breaks = None
        bench.draining.retry(clock.monotonic() + FIRST_WAIT)
        await bench.until(lambda: not bench.draining.is_draining)

    run(work())
    assert bench.storage.steps == [5]


def test_retention_keeps_to_its_rules_there(bench: Bench) -> None:
    async def work() -> None:
        for step in (5, 10, 15):
            bench.snapshot(step)
            bench.draining.drain()
            await bench.until(lambda: not bench.draining.is_draining)

    run(work())
    assert bench.storage.steps == [10, 15]


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_at_the_end_it_goes_into_the_job_directory_if_the_store_does_not_take_it(
    tmp_path: Path, how: str
) -> None:
    bench = Bench(tmp_path, grace=3.0)
    setattr(bench.storage, how, True)
    bench.snapshot(5)

    async def work() -> None:
        bench.draining.deadline = clock.monotonic() + 3.0
        assert await bench.draining.secure(5, may_drain=True) is None
        assert clock.monotonic() < bench.draining.deadline + 0.5

    run(work())
    assert bench.refuge is not None
    (record,) = bench.refuge.records()
    assert record.step == 5
    assert bench.refuge.verify(record) == []
    committed = [fact for fact in bench.facts if isinstance(fact, CheckpointCommitted)]
    assert [(fact.path, fact.emergency) for fact in committed] == [(str(record.path), True)]
    assert "s3://bucket/run did not take step 5" in bench.said[0]


def test_a_deadline_that_comes_up_while_it_waits_counts(tmp_path: Path) -> None:
    bench = Bench(tmp_path, grace=1.0)
    bench.storage.hangs = True
    bench.snapshot(5)

    async def work() -> None:
        waiting = asyncio.ensure_future(bench.draining.secure(5, may_drain=True))
        await bench.until(bench.storage.begun.is_set)
        bench.draining.deadline = clock.monotonic() + 2.0
        assert await asyncio.wait_for(waiting, DEADLINE) is None

    run(work())
    assert bench.refuge is not None
    assert [record.step for record in bench.refuge.records()] == [5]


def test_what_fits_nowhere_stays_in_memory(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.storage.fails = True
    (tmp_path / "job").write_text("in the way")
    bench.snapshot(5)

    async def work() -> None:
        problem = await bench.draining.secure(5, may_drain=True)
        assert problem is not None
        assert "step 5 is in memory only" in problem

    run(work())
    assert bench.failures() == [5, 5]


def test_without_a_refuge_it_goes_on_past_the_deadline(tmp_path: Path) -> None:
    """A directory is all there is: whoever wants us gone will kill us."""
    bench = Bench(tmp_path, refuge=False)
    bench.storage.go.clear()
    bench.snapshot(5)

    async def work() -> None:
        bench.draining.deadline = clock.monotonic() - 1
        waiting = asyncio.ensure_future(bench.draining.secure(5, may_drain=True))
        await bench.until(bench.storage.begun.is_set)
        bench.storage.go.set()
        assert await asyncio.wait_for(waiting, DEADLINE) is None

    run(work())
    assert bench.storage.steps == [5]


def left_behind(bench: Bench, step: int) -> CheckpointRecord:
    """An emergency copy that a former run has made."""
    assert bench.refuge is not None
    source = write_source(bench.refuge.where.parent / "source")
    origin = Origin(
        step=step, attempt=3, epoch=1, run_id="run-1", world_size=2, created=7.0, metrics={"loss": 2.0}
    )
    bench.refuge.drain(source, origin)
    (record,) = bench.refuge.records()
    return record


def test_an_emergency_copy_is_stored_where_it_belongs(bench: Bench) -> None:
    left = left_behind(bench, 5)

    async def work() -> None:
        bench.draining.known_good(5)
        bench.draining.bring(left)
        await bench.until(lambda: not bench.draining.is_draining)
        assert await bench.draining.secure(5, may_drain=True) is None  # once is enough

    run(work())
    assert bench.storage.steps == [5]
    assert bench.slots.held == [], "it is in no slot"
    (fact,) = bench.facts
    assert isinstance(fact, CheckpointCommitted)
    assert (fact.path, fact.attempt, fact.emergency) == ("s3://bucket/run/step-000000005", 3, False)
    assert dict(fact.metrics) == {"loss": 2.0}
    assert bench.said == ["the emergency copy of step 5 is in s3://bucket/run now, too"]


def test_a_newer_snapshot_is_stored_instead(bench: Bench) -> None:
    left = left_behind(bench, 5)

    async def work() -> None:
        bench.draining.known_good(5)
        bench.snapshot(10)
        bench.draining.bring(left)
        assert await bench.draining.secure(10, may_drain=True) is None

    run(work())
    assert bench.storage.steps == [10]
    assert bench.said == []


@pytest.mark.parametrize("damaged", [False, True])
def test_an_emergency_copy_that_cannot_be_stored_stays(bench: Bench, damaged: bool) -> None:
    left = left_behind(bench, 5)
    bench.storage.fails = not damaged
    if damaged:
        (catalog.local(left) / "__0_0.distcp").write_bytes(b"x" * 10)

    async def work() -> None:
        bench.draining.known_good(5)
        bench.draining.bring(left)
        await bench.until(lambda: not bench.draining.is_draining)
        assert bench.failures() == [5]
        assert await bench.draining.secure(5, may_drain=True) is None  # tried again
        assert bench.failures() == [5, 5]

    run(work())
    assert bench.storage.steps == []
    why = f"{left.path} is damaged: __0_0.distcp" if damaged else "503 Service Unavailable"
    (said,) = bench.said
    assert said.startswith(f"s3://bucket/run did not take step 5 ({why}")
    assert said.endswith(f"it lies in {left.path}")


def test_cancelled_it_leaves_the_snapshot_in_memory(bench: Bench) -> None:
    bench.storage.go.clear()
    bench.snapshot(5)

    async def work() -> None:
        bench.draining.drain()
        await bench.until(bench.storage.begun.is_set)
        bench.draining.cancel()
        bench.storage.go.set()
        problem = await bench.draining.secure(None, may_drain=False)
        assert problem is not None
        assert "in memory only (cancelled)" in problem

    run(work())
    assert bench.storage.steps == []


def test_only_what_is_on_other_storage_has_a_refuge(tmp_path: Path) -> None:
    job, own = JobDirectory(tmp_path / "job"), tmp_path / "job" / "checkpoints"

    def place(checkpoints: Location | None) -> Path | None:
        return refuge(Options(dir=job.path, checkpoints=checkpoints), job)

    assert place(None) is None
    assert place(tmp_path / "beside" / "it") is None
    assert place(Path("/dev/shm") / tmp_path.name) == own
    assert place(location.parse("s3://bucket/gpt")) == own
