"""``everstep checkpoints list | verify | prune``."""

from __future__ import annotations

import json as jsons
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.location import Location
from supervisor.checkpoint.manifest import Key
from supervisor.checkpoint.storage import CheckpointStorage, Owner, open_storage
from supervisor.decide.retention import RetentionPolicy, to_remove
from supervisor.edge.jobdir import JobDirectory
from supervisor.errors import JobError, UsageError
from supervisor.replay import Replay


def checkpoints_of(job: Path) -> Location:
    """Where a job keeps its checkpoints: where its newest one went, else the default place."""
    return _folded(job).checkpoints or job / "checkpoints"


def show_list(job: Path, place: Location, *, json: bool, verify: bool) -> int:
    """Every checkpoint, newest first. Those never compared byte by byte have ``verified`` null."""
    key = Key.from_environment()
    storage = open_storage(place, key)
    records = storage.records()
    if verify:
        records = [_verified(record, storage) for record in records]
        verdicts = {record.path: record.problem is None for record in records}
    else:
        verdicts = _folded(job).verdicts | {record.path: False for record in records if record.problem}
    if json:
        _print_json([_plain(record, verdicts.get(record.path)) for record in records])
        return 0
    if not records:
        print(f"no checkpoints in {place}")
    for record in records:
        print(_row(record, verdicts.get(record.path)))
    return 0


def verify(place: Location, steps: Collection[int], *, json: bool) -> int:
    """Compare every byte of all checkpoints, or of those at ``steps``; 1 when any is bad."""
    storage = open_storage(place, Key.from_environment())
    records = storage.records()
    missing = sorted(set(steps) - {record.step for record in records})
    if missing:
        there = ", ".join(str(record.step) for record in records) or "none"
        raise UsageError(f"no checkpoint of step {missing[0]} in {place}; there are: {there}")
    checked = []
    for record in records:
        if steps and record.step not in steps:
            continue
        checked.append(_verified(record, storage))
        if not json:
            print(_row(checked[-1], checked[-1].problem is None), flush=True)
    if json:
        _print_json([_plain(record, record.problem is None) for record in checked])
    elif not checked:
        print(f"no checkpoints in {place}")
    return 1 if any(record.problem for record in checked) else 0


def prune(job: Path, place: Location, policy: RetentionPolicy, *, json: bool, dry_run: bool) -> int:
    """Remove what no rule keeps. The newest one that verifies stays, and so do damaged ones: those are left to the user."""
    storage = open_storage(place, Key.from_environment())
    directory = JobDirectory(job)
    if (file := directory.read()) is None:
        raise JobError(f"no job in {directory.path}")
    if dry_run:
        removed = _superfluous(storage, policy)
    else:
        with directory.claim():  # a running supervisor prunes by itself, and may be reading or writing one
            removed = _superfluous(storage, policy)
            for record in removed:
                storage.remove(record)
            storage.sweep(Owner(file.run_id, file.epoch))
    if json:
        _print_json([_plain(record, None) for record in removed])
        return 0
    verb = "would remove" if dry_run else "removed"
    for record in removed:
        print(f"{verb} step {record.step}  {record.path}")
    if not removed:
        print(f"nothing to remove in {place}")
    return 0


def _superfluous(storage: CheckpointStorage, policy: RetentionPolicy) -> list[CheckpointRecord]:
    best: int | None = None
    records = []
    for record in storage.records():  # newest first
        if best is None and record.step >= 0:
            record = _verified(record, storage)
            best = record.step if record.problem is None else None
        records.append(record)
    steps = to_remove(records, policy, {best} if best is not None else set())
    return [record for record in records if record.problem is None and record.step in steps]


def _verified(record: CheckpointRecord, storage: CheckpointStorage) -> CheckpointRecord:
    problems = storage.verify(record)
    return replace(record, problem="; ".join(problems) or None)


def _folded(job: Path) -> Replay:
    """What the journal knows."""
    directory = JobDirectory(job)
    if directory.read() is None and not (directory.path / "checkpoints").is_dir():
        raise JobError(f"no job in {directory.path}")
    folded = Replay(directory.journal)
    folded.advance()
    return folded


def _plain(record: CheckpointRecord, verified: bool | None) -> dict[str, object]:
    return {
        "step": record.step,
        "path": str(record.path),
        "bytes": record.bytes,
        "metrics": {
            name: value for name, value in record.metrics.items() if value - value == 0
        },  # JSON has no NaN
        "created": record.created,
        "verified": verified,
        "problem": record.problem,
    }


def _row(record: CheckpointRecord, verified: bool | None) -> str:
    if record.problem:
        return f"step {record.step:>9}  damaged: {record.problem}  {record.path}"
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
    metrics = " ".join(f"{name}={value:.4g}" for name, value in record.metrics.items())
    state = {True: "verified", False: "damaged", None: ""}[verified]
    return f"step {record.step:>9}  {created}  {_size(record.bytes):>9}  {state:<8}  {metrics}".rstrip()


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _print_json(document: object) -> None:
    print(jsons.dumps(document, indent=2))
