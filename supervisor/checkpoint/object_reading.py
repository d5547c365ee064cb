"""Reading checkpoints in an object store: which there are, whether they are whole, and their files. See ``objects``."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from supervisor.checkpoint import catalog
from supervisor.checkpoint.bucket import PART, Bucket, MissingError, together
from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import (
    LARGEST,
    MANIFEST_NAME,
    PARTIAL_NAME,
    FileEntry,
    Key,
    Manifest,
    decode,
)
from supervisor.checkpoint.verify import Hasher, hash_file
from supervisor.errors import CheckpointError

_FILES_AT_ONCE: Final = 2
_READS_AT_ONCE: Final = 8


class ObjectReader:
    """The reading half. Its coroutines raise StorageError."""

    def __init__(self, objects: Bucket, where: Remote, key: Key | None) -> None:
        self._bucket = objects
        self._where = where
        self._key = key

    async def records(self) -> list[CheckpointRecord]:
        """As ``CheckpointStorage.records``."""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for path, size in (await self._bucket.sizes()).items():
            directory, _, name = path.partition("/")
            if name and directory.startswith("step-"):
                found[directory][name] = size
        limit = asyncio.Semaphore(_READS_AT_ONCE)

        async def judge(directory: str) -> CheckpointRecord:
            async with limit:
                return await self._judge(directory, found[directory])

        whole = [
            name
            for name, sizes in found.items()
            if not is_leftover(sizes) and (MANIFEST_NAME in sizes or catalog.parts_named(name) is None)
        ]
        records = await together(map(judge, whole))
        return sorted(records, key=lambda record: (-record.step, record.path.name))

    async def _judge(self, directory: str, sizes: dict[str, int]) -> CheckpointRecord:
        step, path = catalog.step_of(directory), self._where / directory
        if step < 0:
            return CheckpointRecord(
                step=-1, path=path, problem=f"{directory!r} is not the name of a checkpoint"
            )
        try:
            manifest = await self.manifest(directory)
        except CheckpointError as error:
            return CheckpointRecord(step=step, path=path, problem=str(error))
        return CheckpointRecord(
            step=step,
            path=path,
            bytes=manifest.bytes,
            metrics=manifest.origin.metrics,
            created=manifest.origin.created,
            manifest=manifest,
            problem="; ".join(_differences(step, manifest, sizes)) or None,
        )

    async def manifest(self, directory: str) -> Manifest:
        """The manifest of one. Raises CheckpointError as ``manifest.decode`` does, and when there is none."""
        try:
            data = await self._bucket.get(f"{directory}/{MANIFEST_NAME}", LARGEST)
        except MissingError:
            raise CheckpointError(
                f"no {MANIFEST_NAME}: not a checkpoint, or one that was never finished"
            ) from None
        return decode(data, self._key)

    async def verify(self, directory: str) -> list[str]:
        """Every problem of a checkpoint, one line each. Reads all of it, and writes nothing."""
        step = catalog.step_of(directory)
        sizes = await self._bucket.sizes(directory)
        try:
            manifest = await self.manifest(directory)
        except CheckpointError as error:
            return [str(error)]
        present = {path.partition("/")[2]: size for path, size in sizes.items()}
        problems = _differences(step, manifest, present)
        bad = {problem.partition(":")[0] for problem in problems}
        limit = asyncio.Semaphore(_FILES_AT_ONCE)

        async def check(name: str, entry: FileEntry) -> str | None:
            hasher = Hasher(self._key)
            async with limit:
                for start in range(0, entry.bytes, PART):
                    length = min(PART, entry.bytes - start)
                    data = await self._bucket.range(f"{directory}/{name}", start, length)
                    await asyncio.to_thread(hasher.update, data)
            return None if hasher.entry(entry.bytes) == entry else f"{name}: digest does not match"

        checks = [check(name, entry) for name, entry in manifest.files.items() if name not in bad]
        return sorted(problems + [problem for problem in await together(checks) if problem])

    async def fetch(self, directory: str, manifest: Manifest, into: Path) -> None:
        """Write the files into the directory ``into``. Raises CheckpointError when one is not as the manifest says."""
        limit = asyncio.Semaphore(_READS_AT_ONCE)

        async def part(target: Path, name: str, start: int, length: int) -> None:
            async with limit:
                data = await self._bucket.range(f"{directory}/{name}", start, length)
                await asyncio.to_thread(_write, target, data, start)

        async def file(name: str, entry: FileEntry) -> None:
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            starts = range(0, entry.bytes, PART)
            await together(part(target, name, start, min(PART, entry.bytes - start)) for start in starts)
            # read back: what counts is what the ranks will map
            if await asyncio.to_thread(hash_file, target, self._key) != entry:
                raise CheckpointError(f"{name}: digest does not match")

        try:
            await together(file(name, entry) for name, entry in manifest.files.items())
        except MissingError as error:
            raise CheckpointError(f"an object is missing: {error}") from None


def is_leftover(names: Iterable[str]) -> bool:
    """Whether a directory with these names was begun and not committed."""
    return PARTIAL_NAME in names and MANIFEST_NAME not in names


def _differences(step: int, manifest: Manifest, sizes: dict[str, int]) -> list[str]:
    """One line for each thing that is not as the manifest says, by the sizes of the objects."""
    if manifest.step != step:
        return [f"its manifest is of step {manifest.step}"]
    problems = []
    for name, entry in sorted(manifest.files.items()):
        if name not in sizes:
            problems.append(f"{name}: missing")
        elif sizes[name] < entry.bytes:
            problems.append(f"{name}: truncated, {sizes[name]} of {entry.bytes} bytes")
        elif sizes[name] > entry.bytes:
            problems.append(f"{name}: {sizes[name]} bytes, {entry.bytes} expected")
    return problems


def _write(file: Path, data: memoryview, start: int) -> None:
    """Its own descriptor each time: a write that is not waited for any more must not hit another file."""
    fd = os.open(file, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while data:
            count = os.pwrite(fd, data, start)
            data, start = data[count:], start + count
    finally:
        os.close(fd)
