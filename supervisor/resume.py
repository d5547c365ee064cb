"""Where an attempt resumes: the newest consistent state that is still whole, nearest tier first.

A snapshot in this node's RAM wins when it is at least as new as the newest checkpoint: by attempt first, so that what a run
on another host has done meanwhile is not thrown away for an older state of this one. Its files were whole when
``slot.json`` was written, and their sizes are checked. A checkpoint is verified by all of its digests before any rank is
told of it, so all ranks alike skip a damaged one for the newest good one. Where there are checkpoints and none is good, the
job is not begun anew behind its user's back: that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from supervisor.checkpoint import catalog, slots
from supervisor.checkpoint.manifest import Key
from supervisor.errors import CheckpointError
from supervisor.model import Tier


@dataclass(frozen=True)
class Resume:
    """Told to every rank. ``path`` None: from scratch."""

    step: int = 0
    tier: Tier | None = None
    path: Path | None = None
    #: damaged states that were skipped: path and reason
    rejected: tuple[tuple[Path, str], ...] = ()


def choose(
    snapshot: tuple[Path, slots.SlotRecord] | None,
    checkpoints: Path,
    key: Key | None,
) -> Resume:
    """Pick the state to resume from. Reads whole checkpoints: call it in a thread.

    Raises CheckpointError when there are checkpoints and none of them is good, StorageError when they cannot be listed.
    """
    rejected: list[tuple[Path, str]] = []
    ram: Resume | None = None
    if snapshot is not None:
        folder, record = snapshot
        try:
            if slots.read_slot(folder, key) is not None:
                ram = Resume(record.step, Tier.RAM, folder)
        except CheckpointError as error:
            rejected.append((folder, str(error)))
        listed = [known for known in catalog.list_checkpoints(checkpoints, key) if known.problem is None]
        if ram is not None and (record.attempt, record.step) >= max(map(_age, listed), default=(-1, -1)):
            return ram
    good, refused = catalog.newest_good(checkpoints, key)
    rejected += [(bad.path, bad.problem or "damaged") for bad in refused]
    if ram is not None and snapshot is not None:
        record = snapshot[1]
        if good is None or (record.attempt, record.step) > _age(good):
            return Resume(ram.step, ram.tier, ram.path, tuple(rejected))
    if good is None:
        if refused:
            raise CheckpointError(
                f"{checkpoints} holds checkpoints, but none that is whole "
                f"({refused[0].path.name}: {refused[0].problem}): "
                "bring a good one back, or start anew in another --dir"
            )
        return Resume(rejected=tuple(rejected))
    return Resume(good.step, Tier.CHECKPOINT, good.path, tuple(rejected))


def _age(record: catalog.CheckpointRecord) -> tuple[int, int]:
    """Later attempts are newer whatever their step."""
    return (record.manifest.origin.attempt if record.manifest else -1, record.step)
