"""``everstep checkpoints list | verify | prune``, and the plot of a metric over them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from launch import plot
from launch.choosing import Best
from launch.tables import columns, finite, print_json
from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.location import Location, Remote
from supervisor.checkpoint.manifest import Key, read_manifest
from supervisor.checkpoint.sharing import on_disk
from supervisor.checkpoint.storage import CheckpointStorage, Owner, open_storage
from supervisor.checkpoint.verify import problems_of
from supervisor.decide.retention import KeepBest, RetentionPolicy, to_remove
from supervisor.edge.jobdir import JobDirectory
from supervisor.errors import CheckpointError, JobError, UsageError
from supervisor.replay import Replay
from supervisor.wording import size


def checkpoints_of(job: Path) -> Location:
    """Where a job keeps its checkpoints: where its newest one went, else the default place.

    A job directory that was copied or moved says where they were before; those in it are meant.
    """
    own, newest = job.absolute() / "checkpoints", _folded(job).checkpoints
    if isinstance(newest, Path) and newest.name == own.name and own.is_dir():
        is_anothers = (newest.parent / "job.json").exists()
        return own if is_anothers or not newest.exists() else newest
    return newest or job / own.name


def show_list(job: Path, place: Location, *, json: bool, verify: bool, best: Best) -> int:
    """Every checkpoint, newest first. Those never compared byte by byte have ``verified`` null."""
    key = Key.from_environment()
    storage = open_storage(place, key)
    records = storage.records()
    if verify:
        records = [_verified(record, storage) for record in records]
        verdicts = {record.path: record.problem is None for record in records}
    else:
        verdicts = _folded(job).verdicts | {record.path: False for record in records if record.problem}
    taken = _on_disk(records)
    winner = best.among(record for record in records if verdicts.get(record.path) is not False)
    if json:
        print_json(
            [
                {
                    **_plain(record, verdicts.get(record.path)),
                    "bytes_on_disk": taken[record.path],
                    "best": record is winner,
                }
                for record in records
            ]
        )
        return 0
    if not records:
        print(f"no checkpoints in {place}")
        return 0
    for line in _table(records, verdicts, taken, winner):
        print(line)
    total = f"{size(sum(record.bytes for record in records))}, {size(sum(taken.values()))} on disk"
    print(f"\n{len(records)} checkpoints in {place}: {total}")
    if winner is not None:
        print(f"* the best: {best}")
    return 0


def draw(
    place: Location,
    metric: str,
    file: Path | None,
    *,
    best: str | None,
    rule: KeepBest | None,
    marked: Collection[int] = (),
) -> str:
    """A metric over the checkpoints: written to ``file`` if there is one; as one line of text in any case.

    The best one is that of the metric itself where ``best`` or the retention rule says which end of it is good, else the
    least. Raises UsageError where no checkpoint has the metric.
    """
    plot.check_file(file)
    storage = open_storage(place, Key.from_environment())
    records = [record for record in storage.records() if record.problem is None]
    points = plot.points_of(metric, {record.step: record.metrics for record in records})
    if file is not None:
        chosen = Best.of(best, rule)
        winner = chosen.among(records) if chosen.metric == metric else None
        plot.write(file, metric, points, best=None if winner is None else winner.step, marked=marked)
    return plot.line(metric, points)


def verify(
    place: Callable[[], Location], steps: Collection[int], paths: Collection[Location], *, json: bool
) -> int:
    """Compare every byte of all checkpoints, or of those at ``steps`` and ``paths``; 1 when any is bad."""
    key = Key.from_environment()
    checks: list[Callable[[], CheckpointRecord]] = []
    if steps or not paths:
        storage = open_storage(place(), key)
        records = storage.records()
        missing = sorted(set(steps) - {record.step for record in records})
        if missing:
            there = ", ".join(str(record.step) for record in records) or "none"
            raise UsageError(f"no checkpoint of step {missing[0]} in {place()}; there are: {there}")
        wanted = [record for record in records if not steps or record.step in steps]
        checks += [partial(_verified, record, storage) for record in wanted]
    checks += [partial(_verified_at, path, key) for path in paths]
    checked = []
    for check in checks:
        checked.append(check())
        if not json:
            print(_row(checked[-1], checked[-1].problem is None), flush=True)
    if json:
        print_json([_plain(record, record.problem is None) for record in checked])
    elif not checked:
        print(f"no checkpoints in {place()}")
    return 1 if any(record.problem for record in checked) else 0


def _verified_at(path: Location, key: Key | None) -> CheckpointRecord:
    """A directory of any name, or one of an object store's. Raises UsageError where there is none."""
    if isinstance(path, Remote):
        storage = open_storage(path.parent, key)
        for record in storage.records():
            if record.path == path:
                return _verified(record, storage)
        raise UsageError(f"{path} is no checkpoint")
    if not path.is_dir():
        raise UsageError(f"{path} is no checkpoint: no such directory")
    try:
        manifest = read_manifest(path, key)
    except CheckpointError as error:
        return CheckpointRecord(step=-1, path=path, problem=str(error))
    problems = problems_of(path, manifest, key)
    return CheckpointRecord(
        step=manifest.step,
        path=path,
        bytes=manifest.bytes,
        metrics=manifest.origin.metrics,
        created=manifest.origin.created,
        manifest=manifest,
        problem="; ".join(problems) or None,
    )


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
        print_json([_plain(record, None) for record in removed])
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
        "metrics": finite(record.metrics),
        "created": record.created,
        "verified": verified,
        "problem": record.problem,
    }


def _on_disk(records: list[CheckpointRecord]) -> dict[Location, int]:
    """What each takes beyond the older ones, with which it may share files; in an object store, what it has."""
    taken: dict[Location, int] = {record.path: record.bytes for record in records}
    return taken | on_disk(
        (record.path, record.manifest.files if record.manifest else ())
        for record in reversed(records)
        if isinstance(record.path, Path)
    )


def _table(
    records: list[CheckpointRecord],
    verdicts: Mapping[Location, bool],
    taken: Mapping[Location, int],
    winner: CheckpointRecord | None,
) -> list[str]:
    names = sorted({name for record in records for name in record.metrics})
    rows = [("", "step", "made", "size", "on disk", "state", *names)]
    for record in records:
        good = verdicts.get(record.path)
        rows.append(
            (
                "*" if record is winner else "",
                str(record.step) if record.step >= 0 else "?",
                _made(record),
                size(record.bytes) if record.manifest else "",
                size(taken[record.path]) if record.manifest else "",
                {True: "verified", False: "damaged", None: ""}[good],
                *(f"{record.metrics[name]:.4g}" if name in record.metrics else "" for name in names),
            )
        )
    lines = columns(rows, right=(1, 3, 4, *range(6, 6 + len(names))))
    problems = [f"   {record.path}: {record.problem}" for record in records if record.problem]
    return [*lines, *(["", *problems] if problems else [])]


def _made(record: CheckpointRecord) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)) if record.manifest else ""


def _row(record: CheckpointRecord, verified: bool | None) -> str:
    if record.problem:
        return f"step {record.step:>9}  damaged: {record.problem}  {record.path}"
    metrics = " ".join(f"{name}={value:.4g}" for name, value in record.metrics.items())
    state = {True: "verified", False: "damaged", None: ""}[verified]
    return f"step {record.step:>9}  {_made(record)}  {size(record.bytes):>9}  {state:<8}  {metrics}".rstrip()
