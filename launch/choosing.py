"""Which checkpoint is meant by a word: a step, ``latest``, ``best``, or a path."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.location import Location, Remote, is_url, parse
from supervisor.checkpoint.manifest import Key, Manifest
from supervisor.checkpoint.storage import open_storage
from supervisor.decide.retention import KeepBest, Mode
from supervisor.errors import CheckpointError, UsageError

_USUAL = "loss"  # what `best` goes by where nobody said


@dataclass(frozen=True)
class Best:
    """Which checkpoint is the best one."""

    metric: str
    mode: Mode = Mode.MIN

    @classmethod
    def parse(cls, text: str) -> Best:
        """From ``METRIC:min|max``. Raises UsageError."""
        metric, _, mode = text.rpartition(":")
        if not metric or mode not in tuple(Mode):
            raise UsageError(f"--best {text!r}: METRIC:min or METRIC:max is required, e.g. accuracy:max")
        return cls(metric, Mode(mode))

    @classmethod
    def of(cls, given: str | None, rule: KeepBest | None) -> Best:
        """What was asked for, else what the retention rule goes by, else the least loss. Raises UsageError."""
        if given is not None:
            return cls.parse(given)
        return cls(rule.metric, rule.mode) if rule is not None else cls(_USUAL)

    def among(self, records: Iterable[CheckpointRecord]) -> CheckpointRecord | None:
        """The best of those that look good; of equals the newer one."""
        sign = 1 if self.mode is Mode.MIN else -1
        ranked = [
            (sign * value, -record.step, record)
            for record in records
            if record.problem is None
            and (value := record.metrics.get(self.metric)) is not None
            and math.isfinite(value)
        ]
        return min(ranked, key=lambda entry: entry[:2])[2] if ranked else None

    def __str__(self) -> str:
        return f"{self.metric}:{self.mode}"


@dataclass(frozen=True)
class Chosen:
    """A checkpoint, and the directory that has its files. ``verified``: every byte of it was compared just now."""

    path: Path
    where: Location
    verified: bool = False
    manifest: Manifest | None = None  # where it does not lie beside the files


def locate(
    word: str, place: Callable[[], Location], best: Callable[[], Best], key: Key | None
) -> CheckpointRecord | Path:
    """What ``word`` means, not looked at yet; a directory that is named by its path, as that path.

    ``place`` and ``best`` are asked for only if needed. Raises UsageError where there is none.
    """
    if is_url(word):
        where = parse(word)
        assert isinstance(where, Remote)
        for record in open_storage(where.parent, key).records():
            if record.path == where:
                return record
        raise UsageError(f"{where} is no checkpoint: there is none of that name in {where.parent}")
    if os.sep in word or word in (".", "..") or (not word.isdigit() and Path(word).is_dir()):
        path = Path(word).expanduser().absolute()
        if (path / "job.json").is_file():
            raise UsageError(f"{path} is a job, not a checkpoint: say STEP --dir {path}")
        return path
    if word not in ("latest", "best") and not (word.isascii() and word.isdigit()):
        raise UsageError(f"{word!r} is no checkpoint: a step, latest, best or the path of a directory is one")
    storage = open_storage(place(), key)
    records = storage.records()
    if word == "latest":
        problem = ""
        for record in records:
            problems = [record.problem] if record.problem else storage.verify(record)
            if not problems:
                return record
            problem = problem or f"{record.path.name}: {'; '.join(problems)}"
        raise UsageError(
            f"no good checkpoint in {storage.where} ({problem})"
            if problem
            else f"no checkpoints in {storage.where}"
        )
    if word == "best":
        rule = best()
        found = rule.among(records)
        if found is None:
            known = sorted({name for one in records for name in one.metrics})
            raise UsageError(
                f"no checkpoint in {storage.where} has a metric {rule.metric!r} to be best by: "
                f"--best METRIC:min|max chooses another ({', '.join(known) or 'none is recorded'})"
            )
        return found
    found = next((one for one in records if one.step == int(word)), None)
    if found is None:
        there = ", ".join(str(one.step) for one in records) or "none"
        raise UsageError(f"no checkpoint of step {word} in {storage.where}; there are: {there}")
    return found


def choose(
    word: str,
    place: Callable[[], Location],
    best: Callable[[], Best],
    key: Key | None,
    scratch: Callable[[], Path],
) -> Chosen:
    """The checkpoint that ``word`` means, on this host: one in an object store is fetched to ``scratch``, each byte checked.

    Raises UsageError where there is none, CheckpointError for a damaged one, StorageError.
    """
    found = locate(word, place, best, key)
    if isinstance(found, Path):
        return Chosen(found, found)
    if found.problem is not None:
        raise CheckpointError(f"{found.path} is damaged: {found.problem}")
    if isinstance(found.path, Path):
        return Chosen(found.path, found.path, verified=word == "latest")
    into = scratch()
    local = open_storage(found.path.parent, key).fetch(found, into)
    return Chosen(local, found.path, verified=True, manifest=found.manifest)
