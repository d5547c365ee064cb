"""Where an attempt resumes: the newest consistent state that is still whole, nearest tier first.

A snapshot in this node's RAM wins when it is at least as new as the newest checkpoint: by attempt first, so that what a run
on another host has done meanwhile is not thrown away for an older state of this one. Its files were whole when
``slot.json`` was written, and their sizes are checked. A checkpoint is verified by all of its digests before any rank is
told of it, so all ranks alike skip a damaged one for the newest good one. On several nodes each compares only what its ranks read,
while they read it (``checkpoint/on_demand``). Damage that is found so ends the attempt, and before the next one all is verified as
on one node; as it is where an older snapshot in RAM would have to be given up for a checkpoint that may be damaged. Where there are checkpoints and none is good, the
job is not begun anew behind its user's back: that is an error.

Checkpoints may lie in two places: an object store, and the job directory with its emergency copies (or what was there
before ``--checkpoints`` was given). Both count. What comes from an object store is fetched first, for the ranks to read a
local directory. A store that does not answer never holds up an attempt that can go on from RAM: once this run has looked
there, whatever is newer it knows itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from supervisor.checkpoint import slots
from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.location import Location, Remote
from supervisor.checkpoint.manifest import Key, fingerprint
from supervisor.checkpoint.on_demand import OnDemand
from supervisor.checkpoint.storage import CheckpointStorage
from supervisor.errors import CheckpointError
from supervisor.model import Tier
from supervisor.staging import Staging

Age = tuple[int, int]


@dataclass(frozen=True)
class Resume:
    """Told to every rank. ``path`` None: from scratch."""

    step: int = 0
    tier: Tier | None = None
    path: Path | None = None
    #: where the state is kept; ``path`` may be a copy of it that was fetched for the ranks
    kept: Location | None = None
    #: … of a checkpoint: which it is (``checkpoint/manifest.py``)
    fingerprint: str = ""
    #: damaged states that were skipped: path and reason
    rejected: tuple[tuple[Location, str], ...] = ()
    #: through which the ranks must ask for what they read
    on_demand: OnDemand | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sources:
    """What there is to resume from. ``newest``: attempt and step of the newest checkpoint, if that is known for certain."""

    snapshot: tuple[Path, slots.SlotRecord] | None
    places: Sequence[CheckpointStorage]
    key: Key | None
    staging: Staging
    newest: Age | None = None
    is_bad: Callable[[int, int], bool] = lambda *_: False  # by attempt and step (decide/rollback.py)
    nodes: int = 1
    suspicious: bool = False  # ranks could not load what they were told to: verify all


def choose(sources: Sources, cancelled: Callable[[], bool] = lambda: False) -> Resume:
    """Pick the state to resume from. Reads whole checkpoints: call it in a thread.

    Raises CheckpointError when there are checkpoints and none of them is good, StorageError when they cannot be listed or
    fetched (CancelledError when ``cancelled`` said so).
    """
    rejected: list[tuple[Location, str]] = []
    ram, age = _from_ram(sources, rejected)
    if ram is not None and sources.newest is not None and age >= sources.newest:
        return ram
    listed = [(place, record) for place in sources.places for record in place.records()]
    condemned = [record for _, record in listed if sources.is_bad(*_age(record))]
    listed = [(place, record) for place, record in listed if record not in condemned]
    whole = [_age(record) for _, record in listed if record.problem is None]
    if ram is not None and age >= max(whole, default=(-1, -1)):
        return ram
    good = None
    refused: list[CheckpointRecord] = []
    for place, record in sorted(listed, key=lambda one: (-one[1].step, -_age(one[1])[0])):
        if record.step < 0 or (ram is not None and isinstance(record.path, Remote) and age > _age(record)):
            continue
        try:
            good = _ready(place, record, sources, cancelled, verify=sources.suspicious or ram is not None)
            break
        except CheckpointError as error:
            rejected.append((record.path, str(error)))
            refused.append(record)
    if ram is not None and (good is None or age > _age(record)):
        return replace(ram, rejected=tuple(rejected))
    if good is None:
        if refused:
            raise CheckpointError(
                f"{refused[0].path.parent} holds checkpoints, but none that is whole "
                f"({refused[0].path.name}: {rejected[-len(refused)][1]}): "
                "bring a good one back, or start anew in another --dir"
            )
        return Resume(rejected=tuple(rejected))
    path, on_demand = (good, None) if isinstance(good, Path) else (good.path, good)
    which = fingerprint(record.manifest) if record.manifest is not None else ""
    return Resume(record.step, Tier.CHECKPOINT, path, record.path, which, tuple(rejected), on_demand)


def _from_ram(sources: Sources, rejected: list[tuple[Location, str]]) -> tuple[Resume | None, Age]:
    if sources.snapshot is None:
        return None, (-1, -1)
    folder, record = sources.snapshot
    try:
        whole = slots.read_slot(folder, sources.key) is not None
    except CheckpointError as error:
        rejected.append((folder, str(error)))
        whole = False
    if not whole:
        return None, (-1, -1)
    return Resume(record.step, Tier.RAM, folder, folder), (record.attempt, record.step)


def _ready(
    place: CheckpointStorage,
    record: CheckpointRecord,
    sources: Sources,
    cancelled: Callable[[], bool],
    *,
    verify: bool,
) -> Path | OnDemand:
    """A local directory with every byte of it checked; on several nodes, one that is checked as it is read."""
    if sources.nodes == 1:
        return sources.staging.whole(place, record, cancelled)
    if verify and (problems := place.verify(record, cancelled=cancelled)):
        raise CheckpointError("; ".join(problems))
    return sources.staging.on_demand(place, record, sources.nodes, cancelled)


def _age(record: CheckpointRecord) -> Age:
    """Later attempts are newer whatever their step."""
    return (record.manifest.origin.attempt if record.manifest else -1, record.step)
