"""What checkpoints there are, which of them are good, and how one is removed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, overload

from supervisor.checkpoint.directory import discard, is_leftover, sync_directory, translated
from supervisor.checkpoint.location import Location, Remote
from supervisor.checkpoint.manifest import MANIFEST_NAME, Key, Manifest, read_manifest
from supervisor.checkpoint.verify import problems_of, size_problems
from supervisor.edge.files import LOCAL, Files
from supervisor.errors import CheckpointError, StorageError

_PREFIX: Final = "step-"
_ASIDE: Final = "bad-"
_NAME: Final = re.compile(r"step-([0-9]{9,18})(?:-(0|[1-9][0-9]*)-(0|[1-9][0-9]*))?")


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A directory (or a prefix in an object store) that is, or should be, a checkpoint.

    ``problem`` None: whole as far as was looked.
    """

    step: int  # -1 when its name does not say
    path: Location
    bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: float = 0.0  # Unix seconds; 0 without a readable manifest
    manifest: Manifest | None = None
    problem: str | None = None


@overload
def step_directory(checkpoints: Path, step: int) -> Path: ...
@overload
def step_directory(checkpoints: Remote, step: int) -> Remote: ...
def step_directory(checkpoints: Location, step: int) -> Location:
    """Where the checkpoint of ``step`` lies."""
    return checkpoints / f"{_PREFIX}{step:09d}"


def step_of(name: str) -> int:
    """The step that a checkpoint's directory is named for; -1 when it is not the name of one."""
    match = _NAME.fullmatch(name)
    step = int(match[1]) if match else -1
    return step if match is not None and match[1] == f"{step:09d}" else -1


def parts_name(step: int, attempt: int, epoch: int) -> str:
    """The name in an object store of a checkpoint of several nodes (``object_parts`` says why it is another one)."""
    return f"{_PREFIX}{step:09d}-{attempt}-{epoch}"


def parts_named(name: str) -> tuple[int, int, int] | None:
    """Step, attempt and epoch of a name that ``parts_name`` gave."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] is None or step_of(name) < 0:
        return None
    return int(match[1]), int(match[2]), int(match[3])


def manifest_of(record: CheckpointRecord) -> Manifest:
    """That of a checkpoint which is whole as far as was looked. Raises CheckpointError for any other."""
    if record.manifest is None or record.problem is not None:
        raise CheckpointError(record.problem or f"no {MANIFEST_NAME}")
    return record.manifest


def local(record: CheckpointRecord) -> Path:
    """The directory of a checkpoint that is in one."""
    assert isinstance(record.path, Path), record.path
    return record.path


def list_checkpoints(checkpoints: Path, key: Key | None = None) -> list[CheckpointRecord]:
    """Every checkpoint, newest first, judged by its manifest and its files' sizes.

    Leftovers and whatever is not called ``step-…`` are not listed; no directory at all is an empty list. Raises
    StorageError when ``checkpoints`` cannot be read.
    """
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise translated(error, "listing", checkpoints) from error
    candidates = [checkpoints / name for name in names if name.startswith(_PREFIX)]
    records = [inspect(path, key) for path in candidates if not _is_swept(path)]
    return sorted(records, key=lambda record: (-record.step, record.path.name))


def find(path: Path, key: Key | None = None) -> CheckpointRecord | None:
    """The record of one directory, None where ``list_checkpoints`` would have none. Raises StorageError."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise translated(error, "reading", path) from error
    is_listed = path.name.startswith(_PREFIX) and not (stat.S_ISDIR(there.st_mode) and _is_swept(path))
    return inspect(path, key) if is_listed else None


def inspect(path: Path, key: Key | None = None) -> CheckpointRecord:
    """The record of one directory, as ``list_checkpoints`` has it."""
    step = step_of(path.name)
    if step < 0:
        return CheckpointRecord(step=-1, path=path, problem=f"{path.name!r} is not the name of a checkpoint")
    problem = None
    manifest = None
    if path.is_symlink():
        problem = "is a symbolic link"
    elif not path.is_dir():
        problem = "is not a directory"
    else:
        try:
            manifest = read_manifest(path, key)
        except CheckpointError as error:
            problem = str(error)
    if manifest is None:
        return CheckpointRecord(step=step, path=path, problem=problem)
    if manifest.step != step:
        problem = f"its manifest is of step {manifest.step}"
    else:
        problem = "; ".join(size_problems(path, manifest)) or None
    return CheckpointRecord(
        step=step,
        path=path,
        bytes=manifest.bytes,
        metrics=manifest.origin.metrics,
        created=manifest.origin.created,
        manifest=manifest,
        problem=problem,
    )


def verify(
    record: CheckpointRecord,
    key: Key | None = None,
    *,
    threads: int | None = None,
    over: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Every problem of a checkpoint, one line each with the file's name; empty when every byte is as it was.

    Raises CancelledError once it is ``over``. The manifest is read again, so what counts is what is there now.
    """
    path = local(record)
    now = inspect(path, key)
    if now.manifest is None or now.manifest.step != now.step:
        return [now.problem or "no manifest"]
    return problems_of(path, now.manifest, key, threads=threads, over=over)


def newest_good(
    checkpoints: Path, key: Key | None = None, skip: Iterable[Path | str] = ()
) -> tuple[CheckpointRecord | None, list[CheckpointRecord]]:
    """The newest checkpoint that verifies, and the newer ones that do not (``problem`` says why).

    Those whose path is in ``skip`` are passed over in silence.
    """
    skipped = {Path(path) for path in skip}
    rejected: list[CheckpointRecord] = []
    for record in list_checkpoints(checkpoints, key):
        if record.path in skipped or record.step < 0:
            continue
        problems = verify(record, key)
        if not problems:
            return record, rejected
        rejected.append(replace(record, problem="; ".join(problems)))
    return None, rejected


def remove(record: CheckpointRecord, *, files: Files = LOCAL) -> None:
    """Delete a checkpoint, manifest first; gone already is fine. Raises StorageError."""
    path = local(record)
    if path.is_symlink() or not path.is_dir():
        if os.path.lexists(path):
            raise StorageError(f"{path} is not a directory: not removed")
        return
    try:
        discard(path, files=files)
    except OSError as error:
        raise translated(error, "removing", path) from error


def set_aside(records: Sequence[CheckpointRecord], *, files: Files = LOCAL) -> Path | None:
    """Take bad checkpoints of one directory out of the way: the first gets the name ``bad-step-…``, the others are removed.

    What had such a name before is removed, so one of them is kept at most, for people to look at. Raises StorageError.
    """
    if not records:
        return None
    first = local(records[0])
    aside = first.with_name(f"{_ASIDE}{first.name}")
    try:
        for name in sorted(os.listdir(first.parent)):
            if name.startswith(_ASIDE) and step_of(name.removeprefix(_ASIDE)) >= 0:
                discard(first.parent / name, files=files)
        files.rename(first, aside)
        sync_directory(first.parent, files=files)
    except OSError as error:
        raise translated(error, "setting aside", first) from error
    for record in records[1:]:
        remove(record, files=files)
    return aside


def sweep(checkpoints: Path, *, owned: Collection[Path] = (), files: Files = LOCAL) -> list[Path]:
    """Remove what drains and removals that never finished have left; the paths removed.

    Precondition: the caller holds the job's lock, and ``owned`` names the directories that its own drains are writing
    now. Only directories that bear our mark are touched, never one with a manifest or without either.
    """
    removed = []
    try:
        for name in sorted(os.listdir(checkpoints)):
            path = checkpoints / name
            if path not in owned and _is_swept(path):
                discard(path, files=files)
                removed.append(path)
    except FileNotFoundError:
        return removed
    except OSError as error:
        raise translated(error, "sweeping", checkpoints) from error
    return removed


def _is_swept(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None and not path.is_symlink() and is_leftover(path)
