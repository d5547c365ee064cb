"""The faults of ``everstep rehearse``, each in two parts: what will be done (said beforehand, or refused), and doing it.

Doing it is a context: what it did is undone when that is left, as far as it can be, however it is left. What would outlast a
rehearsal that is itself killed with SIGKILL: a rank that is stopped (the job finds it as a hang), and a flipped bit, which is
noted in the job directory and put back by the next rehearsal. The bytes that fill a disk, and the lock that sticks a rank,
go with our process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from launch.stored import checkpoints_of
from supervisor.checkpoint import slots
from supervisor.checkpoint.catalog import CheckpointRecord, local
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import Key
from supervisor.checkpoint.storage import CheckpointStorage, open_storage
from supervisor.decide.rehearsal import ABOUT, Kind
from supervisor.edge import ballast, clock, damage, processes
from supervisor.edge.control import ControlPage, Fault, Word
from supervisor.edge.files import free_bytes
from supervisor.edge.link import page_path
from supervisor.edge.target import Target, has_open, held, parent_of
from supervisor.errors import UsageError
from supervisor.record import JobRecord

NOTE: Final = "rehearsal.json"  # in the job directory: what has to be put back
ANSWER: Final = (
    10.0  # seconds for a rank to do what it was asked to (its background thread looks four times a second)
)
SETTLING: Final = 0.2  # seconds for what the ranks have said already to be worked off
_LOOK: Final = 0.005


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The live job that is struck. ``agreed``: the user has said --yes."""

    job: Path
    runtime: Path
    run_id: str
    record: JobRecord
    attempt: int
    rank: int
    agreed: bool
    local_rank: int | None = None  # of the rank on its node, where there are several

    @contextlib.contextmanager
    def page(self) -> Iterator[ControlPage]:
        """The rank's control page."""
        try:
            page = ControlPage(
                page_path(
                    self.runtime, self.attempt, self.rank if self.local_rank is None else self.local_rank
                )
            )
        except PermissionError:
            raise UsageError(f"{self.job} is another user's job") from None
        except (OSError, ValueError):
            raise UsageError(f"attempt {self.attempt} is over: try again") from None
        try:
            yield page
        finally:
            page.close()

    @property
    def pid(self) -> int:
        """Of the rank."""
        with self.page() as page:
            return page[Word.PID]

    @contextlib.contextmanager
    def target(self, pid: int, proof: Callable[[int], bool] | None = None) -> Iterator[Target]:
        """A process of the job, held for certain."""
        ours = proof or partial(processes.bears, entry=f"EVERSTEP_RUN_ID={self.run_id}")
        try:
            with held(pid, ours) as target:
                yield target
        except ProcessLookupError:
            raise UsageError(f"pid {pid} is gone: the job is not where it was, try again") from None
        except PermissionError:
            raise UsageError(f"{self.job} is another user's job") from None


@dataclass(frozen=True, kw_only=True)
class Struck:
    """It is done. ``time`` in Unix seconds; ``relieve`` ends it early."""

    time: float
    relieve: Callable[[], None] = lambda: None
    damaged: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done, in words, and how. Entering ``strike`` raises UsageError when it cannot be done after all."""

    words: str
    strike: Callable[[], AbstractContextManager[Struck]]


def plan(kind: Kind, scene: Scene) -> Plan:
    """How to inflict ``kind``. Raises UsageError when this job does not allow it."""
    match kind:
        case Kind.KILL_RANK:
            return _plan_signal(scene, scene.pid, signal.SIGKILL, f"rank {scene.rank}")
        case Kind.STOP_RANK:
            return _plan_signal(scene, scene.pid, signal.SIGSTOP, f"rank {scene.rank}")
        case Kind.KILL_TORCHRUN:
            return _plan_signal(scene, _launcher(scene), signal.SIGKILL, "torchrun")
        case Kind.NOTICE:
            return _plan_notice(scene)
        case Kind.FULL_DISK:
            return _plan_full_disk(scene)
        case Kind.CORRUPT_CHECKPOINT:
            return _plan_corruption(scene)
        case Kind.EXCEPTION:
            return _plan_inside(scene, kind, Fault.RAISE)
        case Kind.OOM:
            return _plan_inside(scene, kind, Fault.OUT_OF_MEMORY)
        case Kind.STICK_GIL:
            return _plan_inside(scene, kind, Fault.STICK)


# --------------------------------------------------------------------------- signals


def _plan_signal(scene: Scene, pid: int, signum: signal.Signals, whom: str) -> Plan:
    words = f"{signum.name} to {whom} (pid {pid}) of attempt {scene.attempt}"
    return Plan(words=words, strike=partial(_signal, scene, pid, signum))


@contextlib.contextmanager
def _signal(
    scene: Scene, pid: int, signum: signal.Signals, proof: Callable[[int], bool] | None = None
) -> Iterator[Struck]:
    with scene.target(pid, proof) as target:
        now = clock.now()
        target.send(signum)
        try:
            yield Struck(time=now)
        finally:
            if signum is signal.SIGSTOP:
                _resume(target)


def _resume(target: Target) -> None:
    with contextlib.suppress(ProcessLookupError):  # as it should be
        target.send(signal.SIGCONT)


def _launcher(scene: Scene) -> int:
    """The pid of torchrun: the supervisor's child that the rank descends from. A supervisor is not part of its own run."""
    pid = rank = scene.pid
    while processes.bears(parent := parent_of(pid), f"EVERSTEP_RUN_ID={scene.run_id}"):
        pid = parent
    if not parent:
        raise UsageError(f"attempt {scene.attempt} is over: try again")
    if pid == rank:
        raise UsageError("this job runs without torchrun; kill-rank kills its process")
    return pid


def _plan_notice(scene: Scene) -> Plan:
    pid = scene.record.pid or 0
    words = (
        f"SIGUSR1 to the supervisor (pid {pid}): the job saves, stops, and `everstep run` leaves with code 75. "
        "It is not started again: run the same command to carry on"
    )
    holds_lock = partial(has_open, path=scene.job / "lock")
    return Plan(words=words, strike=partial(_signal, scene, pid, signal.SIGUSR1, holds_lock))


# --------------------------------------------------------------------------- inside of a rank


def _plan_inside(scene: Scene, kind: Kind, fault: Fault) -> Plan:
    with scene.page() as page:
        if not page[Word.BEAT_NS]:
            raise UsageError(f"{kind.value} needs a rank that has imported torch, in Python")
    words = f"in rank {scene.rank} of attempt {scene.attempt}: {ABOUT[kind].what}"
    return Plan(words=words, strike=partial(_inside, scene, fault))


@contextlib.contextmanager
def _inside(scene: Scene, fault: Fault) -> Iterator[Struck]:
    with scene.page() as page, _lock_of(page, fault):
        page[Word.FAULT] = fault
        try:
            _wait(lambda: not page[Word.FAULT], f"rank {scene.rank} does not answer: is it stuck already?")
        finally:
            page[Word.FAULT] = 0
        yield Struck(time=clock.unix_of(page[Word.STRUCK_NS]))


@contextlib.contextmanager
def _lock_of(page: ControlPage, fault: Fault) -> Iterator[None]:
    """Hold what a rank that sticks waits for."""
    if fault is not Fault.STICK:
        yield
        return
    with open(page.path, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _wait(done: Callable[[], bool], trouble: str) -> None:
    deadline = clock.monotonic() + ANSWER
    while not done():
        if clock.monotonic() > deadline:
            raise UsageError(trouble)
        clock.pause(_LOOK)


# --------------------------------------------------------------------------- storage


def _plan_full_disk(scene: Scene) -> Plan:
    place = checkpoints_of(scene.job)
    if isinstance(place, Remote):
        raise UsageError(f"the checkpoints go to {place}, which cannot be filled from here")
    points = [point for point in (scene.record.checkpoint, scene.record.snapshot) if point is not None]
    needed = max((point.bytes for point in points), default=0)
    if not needed:
        raise UsageError(
            "nothing was saved yet, so nobody knows how little room is too little: wait for a snapshot"
        )
    leave = min(needed // 2, max(needed // 20, 1 << 20))  # little: what is unchanged takes no room
    folder = place if place.is_dir() else place.parent
    taken = max(0, free_bytes(folder) - leave)
    if ballast.would_take_memory(folder, taken):
        raise UsageError(f"{folder} lies in memory: filling it would take more than half of what is left")
    others = ", ".join(map(str, ballast.used_by_others(folder)))
    if others and not scene.agreed:
        raise UsageError(
            f"{folder} shares its file system with {others}: whoever writes there would find it full; --yes does it all the same"
        )
    words = (
        f"take {taken} bytes of the file system of {folder}, all but {leave}, until a checkpoint has failed; "
        "they are given back in any case"
    )
    return Plan(words=words, strike=partial(_full_disk, folder, leave))


@contextlib.contextmanager
def _full_disk(folder: Path, leave: int) -> Iterator[Struck]:
    with contextlib.ExitStack() as stack:
        try:
            now = clock.now()
            stack.enter_context(ballast.filled(folder, leave))
        except OSError as error:
            raise UsageError(f"{folder} cannot be filled: {error.strerror}") from None
        yield Struck(time=now, relieve=stack.close)


def _plan_corruption(scene: Scene) -> Plan:
    if scene.record.resumed_step is None:
        raise UsageError("the script has no Session, so the job has no checkpoints of ours")
    place = checkpoints_of(scene.job)
    if isinstance(place, Remote):
        raise UsageError(f"the checkpoints are in {place}: only those in a directory can be damaged")
    storage = open_storage(place, Key.from_environment())
    good: list[CheckpointRecord] = []
    for record in storage.records():
        if record.problem is None and not storage.verify(record):
            good.append(record)
        if len(good) == 2 or not good:
            break
    if len(good) < 2:
        raise UsageError(
            f"corrupt-checkpoint needs two whole checkpoints, for the job to have one to go back to; there are {len(good)} "
            f"in {place}: wait for the next"
        )
    newest, older = good
    words = (
        f"flip a bit of {newest.path}, drop the snapshots in memory, SIGKILL to rank {scene.rank}: the job must go back to "
        f"step {older.step}, so what was done since is done again"
    )
    whole = {record.step for record in good}
    return Plan(words=words, strike=partial(_corruption, scene, scene.pid, storage, whole))


@contextlib.contextmanager
def _corruption(scene: Scene, pid: int, storage: CheckpointStorage, whole: set[int]) -> Iterator[Struck]:
    """Nothing new may be saved between the damage and the death, or the job goes on from that: the rank is stopped first."""
    with scene.target(pid) as target:
        target.send(signal.SIGSTOP)
        try:
            _wait(lambda: processes.state_of(pid)[0] == "T", f"rank {scene.rank} cannot be stopped")
            clock.pause(SETTLING)
            newest, *others = (record for record in storage.records() if record.problem is None)
            if not whole & {record.step for record in others}:
                raise UsageError("checkpoints come and go too quickly: try again")
            with damage.flipped(_file_of(newest), scene.job / NOTE):
                for folder in (scene.runtime / "slots").iterdir():
                    slots.invalidate(folder)
                now = clock.now()
                target.send(signal.SIGKILL)
                yield Struck(time=now, damaged=str(newest.path))
        finally:
            _resume(target)


def _file_of(record: CheckpointRecord) -> Path:
    """Its largest file that no other checkpoint shares. Raises UsageError."""
    assert record.manifest is not None
    sizes = {name: entry.bytes for name, entry in record.manifest.files.items() if entry.bytes}
    files = [(size, local(record) / name) for name, size in sizes.items()]
    own = [(size, path) for size, path in files if os.stat(path).st_nlink == 1]
    if not own:
        raise UsageError(f"all files of {record.path} are shared with other checkpoints")
    return max(own)[1]


def mend(scene_job: Path) -> Path | None:
    """Put back what a rehearsal that was killed has left behind; the file that was damaged."""
    return damage.mend_noted(scene_job / NOTE)
