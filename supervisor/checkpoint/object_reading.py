"""Reading checkpoints in an object store: which there are, whether they are whole, and their files. See ``objects``."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
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
from supervisor.checkpoint.pieces import Piece
from supervisor.checkpoint.verify import Hasher, hash_piece
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

        records = await together(judge(name) for name, sizes in found.items() if _is_listed(name, sizes))
        return sorted(records, key=lambda record: (-record.step, record.path.name))

    async def record(self, directory: str) -> CheckpointRecord | None:
        """As ``CheckpointStorage.find``."""
        if not directory.startswith("step-"):
            return None
        found = await self._bucket.sizes(directory)
        sizes = {path.partition("/")[2]: size for path, size in found.items()}
        return await self._judge(directory, sizes) if sizes and _is_listed(directory, sizes) else None

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
            hasher = Hasher(self._key, entry.bytes, whole=not entry.pieces)
            async with limit:
                for start in range(0, entry.bytes, PART):
                    length = min(PART, entry.bytes - start)
                    data = await self._bucket.range(f"{directory}/{name}", start, length)
                    await asyncio.to_thread(hasher.update, data)
            return None if hasher.entry(entry.bytes) == entry else f"{name}: digest does not match"

        checks = [check(name, entry) for name, entry in manifest.files.items() if name not in bad]
        return sorted(problems + [problem for problem in await together(checks) if problem])

    async def fetch(self, directory: str, pieces: Iterable[Piece], into: Folder) -> None:
        """Write these pieces into files of ``into``, of the right size. Raises CheckpointError when one is not as it should be."""
        limit = asyncio.Semaphore(_READS_AT_ONCE)

        async def part(name: str, start: int, length: int) -> None:
            async with limit:
                data = await self._bucket.range(f"{directory}/{name}", start, length)
                await asyncio.to_thread(into.write, name, data, start)

        async def whole(piece: Piece) -> None:
            end = piece.start + piece.length
            await together(
                part(piece.name, start, min(PART, end - start)) for start in range(piece.start, end, PART)
            )
            # read back: what counts is what the ranks will read
            if await asyncio.to_thread(into.digest, piece, self._key) != piece.blake3:
                raise CheckpointError(f"{piece.name}: digest does not match")

        try:
            await together(map(whole, pieces))
        except MissingError as error:
            raise CheckpointError(f"an object is missing: {error}") from None


class Folder:
    """An open directory of files that are being fetched. Raises OSError.

    It is known by its descriptor, so a write that nobody waits for any more hits no file of another directory with this name.
    """

    def __init__(self, path: Path, files: Mapping[str, FileEntry]) -> None:
        for name, entry in files.items():
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.truncate(fd, entry.bytes)
            finally:
                os.close(fd)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def write(self, name: str, data: memoryview, start: int) -> None:
        """Write to a file of it, from ``start`` on."""
        fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            while data:
                count = os.pwrite(fd, data, start)
                data, start = data[count:], start + count
        finally:
            os.close(fd)

    def digest(self, piece: Piece, key: Key | None) -> str:
        """The hex digest of what lies where ``piece`` should."""
        fd = os.open(piece.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return hash_piece(fd, piece, key)
        finally:
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never opened
            os.close(self._fd)


def _is_listed(directory: str, names: Collection[str]) -> bool:
    return not is_leftover(names) and (MANIFEST_NAME in names or catalog.parts_named(directory) is None)


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
