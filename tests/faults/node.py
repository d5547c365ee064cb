"""A job on one node, in one process: trains, snapshots at every step behind the next one, drains, prunes, resumes.

The parts are the real ones; what is missing is what lies between them (processes, sockets, the control page), so that a
whole life takes milliseconds and can be ended at every moment of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from supervisor.checkpoint import slots
from supervisor.checkpoint.catalog import local
from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.checkpoint.manifest import MANIFEST_NAME, Origin
from supervisor.checkpoint.storage import LocalStorage, Owner
from supervisor.decide.retention import RetentionPolicy, to_remove
from supervisor.edge import runtimes
from supervisor.errors import EverstepError, StorageError
from supervisor.resume import Resume, Sources, choose
from supervisor.snapshots import Ranks, Snapshots
from supervisor.staging import Staging
from supervisor.training.engine import ArenaWriter
from supervisor.training.items import Items
from supervisor.training.state import TrainingState
from supervisor.training.world import World
from supervisor.training.writer import TornError, Written

STEPS = 5
DRAINED = (2, 4, 5)  # steps
KEPT = 1  # checkpoints
RUN = "run-1"


class Desk(Protocol):
    """The supervisor, as a worker sees it."""

    def resume(self) -> Resume:
        """Where to begin."""
        ...

    def offer(self) -> int | None:
        """The slot to write next."""
        ...

    def saved(self, step: int, slot: int) -> None:
        """A snapshot is whole."""
        ...

    def failed(self, step: int, slot: int, reason: str, *, torn: bool) -> None:
        """It is not."""
        ...


class Supervisor:
    """Its snapshots and its checkpoints. ``told`` hears of every step that is held whole from now on."""

    def __init__(self, root: Path, attempt: int, told: Callable[[int], None] = lambda step: None) -> None:
        self.attempt = attempt
        self.failures: list[str] = []
        self._told = told
        self._staging = Staging(root / "runtime", root)
        self.storage = LocalStorage(root / "checkpoints")
        self.runtime = root / "runtime"
        runtimes.lay_out(self.runtime, root)
        self.storage.sweep(Owner(RUN, attempt))
        self.snapshots = Snapshots(self.runtime, run_id=RUN, key=None, fact=lambda fact: None)

    def resume(self) -> Resume:
        """As ``Stores.choose``."""
        found = choose(Sources(self.snapshots.newest(), [self.storage], None, self._staging))
        if found.tier is None or found.tier.value != "ram":
            self.snapshots.drop_all()
        return found

    def offer(self) -> int | None:
        """As the protocol says."""
        return self.snapshots.offer()

    def saved(self, step: int, slot: int) -> None:
        """Declare it whole, and drain some of them."""
        try:
            self.snapshots.part(
                0, Ranks(self.attempt, 1, 1), step=step, slot=slot, seconds=0, size=0, metrics={}
            )
        except EverstepError as error:
            self.failed(step, slot, str(error), torn=False)
            return
        self._told(step)
        if step in DRAINED:
            self.drain()

    def failed(self, step: int, slot: int, reason: str, *, torn: bool) -> None:
        """As ``Reception``."""
        self.failures.append(reason)
        if torn:
            self.snapshots.tear(step, slot)
        else:
            self.snapshots.abandon(step, reason)

    def drain(self) -> None:
        """As ``Draining``: the newest snapshot, then what no rule keeps."""
        newest = self.snapshots.newest()
        if newest is None:
            return
        folder, record = newest
        try:
            self.storage.drain(folder, self.origin(record.step))
            self._told(record.step)
            records = self.storage.records()
            doomed = to_remove(records, RetentionPolicy(keep_last=KEPT), protected={record.step})
            for one in records:
                if one.step in doomed and one.problem is None:
                    self.storage.remove(one)
        except StorageError as error:
            self.failures.append(str(error))

    def origin(self, step: int) -> Origin:
        """What a checkpoint bears."""
        return Origin(
            step=step, attempt=self.attempt, epoch=self.attempt + 1, run_id=RUN, world_size=1, created=1e9 + step,
            metrics={}, versions={},
        )  # fmt: skip


class Training:
    """A model, its optimizer, and what is kept of them."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.BatchNorm1d(30, affine=False))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.values: dict[str, int] = {"seen": 0}
        self.state = TrainingState({"model": self.model, "optimizer": self.optimizer}, self.values, World())

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.optimizer.zero_grad()
        self.model(torch.randn(5, 30, generator=generator)).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.values["seen"] = number + 1

    def digest(self) -> str:
        hasher = hashlib.sha256(repr(self.values).encode())
        for value in self.model.state_dict().values():
            hasher.update(value.numpy().tobytes())
        for state in self.optimizer.state.values():
            for name in sorted(state):
                hasher.update(state[name].numpy().tobytes())
        return hasher.hexdigest()[:16]


def work(desk: Desk, runtime: Path) -> Training:
    """A worker's life: resume, train to the end, with a snapshot at every step."""
    training = Training()
    found = desk.resume()
    if found.path is not None:
        training.state.load(found.path)
    done = [found.step]
    folders = [runtime / "slots" / str(index) for index in range(3)]
    writer = ArenaWriter(
        World(),
        cleans=True,
        optimizers={"optimizer": training.optimizer},
        completed=lambda: done[0],
        slots=folders,
    )

    def save(step: int, slot: int, *, behind: bool) -> None:
        def gather() -> Items:
            return training.state.gather(step)

        def finished(outcome: Written | StorageError | None) -> None:
            if isinstance(outcome, StorageError):
                desk.failed(step, slot, str(outcome), torn=isinstance(outcome, TornError))
            elif outcome is not None:
                desk.saved(step, slot)

        writer.write(folders[slot], gather, finished, behind=behind)

    for number in range(found.step, STEPS):
        training.step(number)
        done[0] = number + 1
        writer.flush()
        slot = desk.offer()
        if slot is not None:
            save(number + 1, slot, behind=number + 1 < STEPS)
    writer.close()
    return training


def reference() -> dict[int, str]:
    """The state after each step of a run that nothing disturbs."""
    training = Training()
    digests = {}
    for number in range(STEPS):
        training.step(number)
        digests[number + 1] = training.digest()
    return digests


def held(root: Path) -> dict[str, tuple[int, Path]]:
    """Everything that passes for whole: slots and checkpoints, their steps and places; checked as far as can be."""
    found = {}
    for folder in sorted((root / "runtime" / "slots").glob("*")):
        record = slots.read_slot(folder)
        if record is not None:
            found[f"slot {folder.name}"] = record.step, folder
    storage = LocalStorage(root / "checkpoints")
    for one in storage.records():
        if one.problem is None:
            assert storage.verify(one) == [], f"{one.path} is listed, and is not whole"
            found[one.path.name] = one.step, local(one)
    return found


def check(root: Path, expected: dict[int, str], promised: int) -> None:
    """What is there is right, what was ``promised`` is there, and the job goes on from it to the very end."""
    for name, (step, folder) in held(root).items():
        assert loaded(folder) == (step, expected[step]), f"{name} is not the state of step {step}"
    supervisor = Supervisor(root, 1)
    found = supervisor.resume()
    assert found.step >= promised, f"step {promised} was whole, and the job resumes at {found.step}"
    assert not found.rejected, found.rejected
    training = work(supervisor, supervisor.runtime)
    assert training.digest() == expected[STEPS]
    supervisor.drain()
    assert not supervisor.failures
    whole = held(root)
    assert whole[f"step-{STEPS:09d}"][0] == STEPS
    for name, (step, folder) in whole.items():
        assert loaded(folder) == (step, expected[step]), f"{name} is not the state of step {step}"
    left = {path.name for path in (root / "checkpoints").iterdir()}
    assert left <= set(whole), "something unfinished is left for good"


_known: dict[tuple[tuple[str, bytes], ...], tuple[int, str]] = {}


def loaded(folder: Path) -> tuple[int, str]:
    """The step and the state that a directory holds. What has the same bytes is loaded once."""
    files = [path for path in sorted(folder.iterdir()) if path.name not in (SLOT_NAME, MANIFEST_NAME)]
    key = tuple((path.name, hashlib.sha256(path.read_bytes()).digest()) for path in files)
    if key not in _known:
        training = Training()
        _known[key] = training.state.load(folder), training.digest()
    return _known[key]
