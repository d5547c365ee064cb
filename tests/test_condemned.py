"""States whose numbers went wrong: never resumed from, never kept for newest, out of the way of the good ones to come."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from supervisor.checkpoint import catalog, commit
from supervisor.checkpoint.bucket import Limits, connect
from supervisor.checkpoint.catalog import list_checkpoints, newest_good, set_aside
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.objects import ObjectStorage
from supervisor.checkpoint.storage import CheckpointStorage, LocalStorage
from supervisor.decide.retention import RetentionPolicy
from supervisor.draining import Draining, Stamp
from supervisor.errors import StorageError
from supervisor.model import CheckpointCommitted, CheckpointFailed, Fact
from supervisor.resume import Sources, choose
from supervisor.snapshots import Ranks, Snapshots
from supervisor.staging import Staging
from tests.checkpoint.tools import origin, write_source
from tests.stores.fixtures import WITH_S3
from tests.stores.proxy import Fault, Proxy
from tests.test_draining import Slots


def steps(checkpoints: Path) -> list[int]:
    return [record.step for record in list_checkpoints(checkpoints)]


def made(checkpoints: Path, *steps: int, attempt: int = 0) -> Path:
    for step in steps:
        source = write_source(checkpoints.parent / f"source-{step}", seed=step)
        commit.drain(source, catalog.step_directory(checkpoints, step), origin(step, attempt=attempt))
    return checkpoints


class TestSettingAside:
    def test_the_first_is_kept_for_people_and_is_no_checkpoint_any_more(self, tmp_path: Path) -> None:
        where = made(tmp_path / "checkpoints", 10, 20, 30, 40)
        bad = [record for record in reversed(list_checkpoints(where)) if record.step >= 20]
        assert set_aside(bad) == where / "bad-step-000000020"
        assert sorted(path.name for path in where.iterdir()) == ["bad-step-000000020", "step-000000010"]
        best, rejected = newest_good(where)
        assert best is not None
        assert (best.step, rejected) == (10, [])
        assert not catalog.sweep(where)

    def test_one_of_them_at_most(self, tmp_path: Path) -> None:
        where = made(tmp_path / "checkpoints", 10, 20)
        set_aside(list_checkpoints(where)[:1])
        made(where, 20)
        assert set_aside(list_checkpoints(where)[1:]) == where / "bad-step-000000010"
        assert steps(where) == [20]
        assert not (where / "bad-step-000000020").exists()

    def test_what_cannot_be_set_aside_is_said(self, tmp_path: Path) -> None:
        where = made(tmp_path / "checkpoints", 10)
        record = list_checkpoints(where)
        where.rename(tmp_path / "elsewhere")
        with pytest.raises(StorageError, match="setting aside"):
            set_aside(record)


def is_bad(attempt: int, step: int) -> bool:
    return attempt <= 0 and step >= 20


def test_an_attempt_never_resumes_from_one(tmp_path: Path) -> None:
    """Wherever it lies, and though it is newer."""
    where = made(tmp_path / "checkpoints", 10, 20, 30)
    sources = Sources(None, [LocalStorage(where)], None, Staging(tmp_path / "run", tmp_path), None, is_bad)
    assert choose(sources).step == 10
    made(where, 40, attempt=1)
    assert choose(sources).step == 40


def test_snapshots_are_forgotten(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "runtime", run_id="run", key=None, fact=lambda _: None)
    for step in (10, 20, 30):
        slot = snapshots.offer()
        assert slot is not None
        folder = snapshots._slots[slot]
        folder.mkdir(parents=True)
        (folder / ".metadata").touch()
        assert snapshots.part(0, Ranks(0, 1, 1), step=step, slot=slot, seconds=0.1, size=1, metrics={})
    snapshots.condemn(is_bad)
    newest = snapshots.newest()
    assert newest is not None
    assert newest[1].step == 10
    again = Snapshots(tmp_path / "runtime", run_id="run", key=None, fact=lambda _: None)
    newest = again.newest()
    assert newest is not None, "the good one was left on disk"
    assert newest[1].step == 10


class Bench:
    """A Draining into a directory, or elsewhere; ``bad`` is what the journal condemns."""

    def __init__(
        self, tmp_path: Path, *, keep_last: int = 3, storage: CheckpointStorage | None = None
    ) -> None:
        self.where = tmp_path / "checkpoints"
        self.slots = Slots(tmp_path / "slot")
        self.bad: set[tuple[int, int]] = set()
        self.facts: list[Fact] = []
        self.said: list[str] = []
        self.draining = Draining(
            self.slots, storage or LocalStorage(self.where), None, stamp=Stamp("run", 1, {}),
            policy=RetentionPolicy(keep_last=keep_last), bandwidth=None, grace=5.0, fence=lambda: None,
            fact=self.facts.append, report=self.said.append, is_bad=lambda *age: age in self.bad,
        )  # fmt: skip

    async def drain(self, step: int) -> None:
        self.slots.step = step
        self.draining.drain()
        assert self.draining._task is not None
        await self.draining._task

    def committed(self) -> list[int]:
        return [fact.step for fact in self.facts if isinstance(fact, CheckpointCommitted)]


def test_a_new_checkpoint_takes_the_place_of_a_bad_one_of_the_same_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        made(bench.where, 20, attempt=3)
        bench.bad = {(3, 20)}
        bench.draining.condemn()
        await bench.drain(20)  # of attempt 0, which is no worse for that
        assert bench.committed() == [20]
        (record,) = list_checkpoints(bench.where)
        assert record.manifest is not None
        assert record.manifest.origin.attempt == 0
        assert (bench.where / "bad-step-000000020").is_dir()
        assert "bad checkpoints taken out of the way: step 20" in bench.said[0]

    asyncio.run(scenario())


def test_a_state_that_proves_bad_while_it_is_drained_does_not_stay(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        await bench.drain(10)
        storage = bench.draining._storage
        write = type(storage).drain

        def drain(self: LocalStorage, *args: object, **kwargs: object) -> object:
            manifest = write(self, *args, **kwargs)  # type: ignore[arg-type]
            bench.bad = {(0, 20)}  # the last moment at which it can be found out
            return manifest

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalStorage, "drain", drain)
            await bench.drain(20)
        assert steps(bench.where) == [10]
        assert bench.committed() == [10]
        assert not [fact for fact in bench.facts if isinstance(fact, CheckpointFailed)]
        assert bench.draining.failure is None

    asyncio.run(scenario())


@WITH_S3
def test_in_an_object_store_the_next_drain_takes_them_away_and_until_then_they_are_passed_over(
    tmp_path: Path, reached: Proxy, url: str
) -> None:
    """Nothing can be renamed there, and going back must not wait for a server."""
    where, limits = Remote(url), Limits(timeout=0.5, first_wait=0.05)
    storage = ObjectStorage(connect(where, limits), where, None, limits)
    for step in (10, 20, 30):
        source = write_source(tmp_path / f"source-{step}", seed=step)
        storage.drain(source, origin(step, attempt=3))

    def told() -> list[tuple[int, int]]:
        manifests = [record.manifest for record in storage.records()]
        return [(one.origin.attempt, one.origin.step) for one in manifests if one is not None]

    def resume() -> int:
        staging = Staging(tmp_path / "run", tmp_path)
        return choose(Sources(None, [storage], None, staging, None, lambda *age: age in bench.bad)).step

    bench = Bench(tmp_path, storage=storage)
    bench.bad = {(3, 20), (3, 30)}
    bench.draining.condemn()
    asked = len(reached.requests)
    asyncio.run(bench.draining.set_aside())
    assert len(reached.requests) == asked
    assert resume() == 10

    reached.set(Fault("status", only=rb"^DELETE|[?&]delete"))
    asyncio.run(bench.drain(20))  # of attempt 0
    assert (bench.committed(), bench.said) == ([], [])
    assert [fact.step for fact in bench.facts if isinstance(fact, CheckpointFailed)] == [20]
    assert (0, 20) not in told(), "it would lie beside a bad one"
    assert resume() == 10

    reached.set(None)
    asyncio.run(bench.drain(20))
    assert bench.committed() == [20]
    assert told() == [(0, 20), (3, 10)]
    assert [storage.verify(record) for record in storage.records()] == [[], []]
    assert bench.said == ["bad checkpoints taken out of the way: step 20, 30"]


@pytest.mark.parametrize("proven", [None, 10, 25])
def test_retention_keeps_one_that_is_known_to_be_in_order(tmp_path: Path, proven: int | None) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, keep_last=1)
        for step in (10, 20, 30, 40):
            bench.draining.proven = None if proven is None else min(step, proven)
            await bench.drain(step)
        kept = {None: [40], 10: [40, 10], 25: [40, 20]}[proven]
        assert steps(bench.where) == kept

    asyncio.run(scenario())
