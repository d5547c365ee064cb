"""Checkpoints in an object store: the same files under the same names, without rename and without fsync.

An object store has neither directories nor rename, and an object appears whole or not at all. So the commit is the upload of
the manifest, last, if-absent. Until then a *marker* (``everstep.json.partial``, which says whose it is) tells that a prefix
is being written; a removal starts with the marker and then takes the manifest. At any instant, whatever a crash left,

- ``everstep.json`` is there: it was whole when it was committed (and ``verify`` says whether it still is);
- only the marker is there: a leftover, never listed, removed by ``sweep`` if it is this job's;
- other objects without either: not ours, never touched.

**Two writers.** The marker is created if-absent, so of two that begin the same step one goes on. A later supervisor of the
same job (a higher epoch) takes the marker over; the older one finds out, from the job directory before each file and from
the marker before its manifest, and gives up. What cannot be excluded without a rename: an upload that the older one has
begun before it lost the job may end after the newer one's manifest, and replace one of its files. Its digest then does not
match, so that checkpoint is found damaged and skipped for the one before; no wrong byte is ever loaded.
"""

# ruff: noqa: D102 - the methods are explained by the protocol (``storage.CheckpointStorage``)

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from obstore.store import ObjectStore

from supervisor.checkpoint import bucket, catalog
from supervisor.checkpoint.bucket import PART, Bucket, Feed, Limits, MissingError, TakenError
from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.commit import no_fence
from supervisor.checkpoint.copying import CancelledError
from supervisor.checkpoint.directory import payload
from supervisor.checkpoint.location import Location, Remote
from supervisor.checkpoint.manifest import (
    LARGEST,
    MANIFEST_NAME,
    METADATA_NAME,
    PARTIAL_NAME,
    FileEntry,
    ForeignError,
    Key,
    Manifest,
    Origin,
    decode,
    encode,
)
from supervisor.checkpoint.storage import Owner
from supervisor.checkpoint.verify import Hasher, hash_file
from supervisor.edge.files import Pace
from supervisor.errors import CheckpointError, ConfigError, StorageError

_FILES_AT_ONCE: Final = 2
_READS_AT_ONCE: Final = 8
_PROBE: Final = 10.0  # seconds at most for one request of the probe
_CLEANING: Final = 2.0  # seconds for removing what a failed drain has written
_LARGEST_MARKER: Final = 4096  # bytes


class ObjectStorage:
    """One prefix of an object store. Every call has a loop of its own, in the thread that makes it."""

    def __init__(self, store: ObjectStore, where: Remote, key: Key | None, limits: Limits) -> None:
        self._where = where
        self._key = key
        self._limits = limits
        self._store = store
        self._bucket = Bucket(store, where, limits)
        # what resumes has nothing else to do: it is more patient than what can be done again with the next snapshot
        self._patient = Bucket(store, where, replace(limits, attempts=100, patience=10 * limits.timeout))

    @classmethod
    def at(cls, where: Remote, key: Key | None, *, timeout: float) -> ObjectStorage:
        """The one that a URL names. Raises ConfigError; asks nobody yet."""
        limits = Limits(timeout=timeout)
        return cls(bucket.connect(where, limits), where, key, limits)

    @property
    def where(self) -> Location:
        return self._where

    # ------------------------------------------------------------------ the catalogue

    def records(self) -> list[CheckpointRecord]:
        return bucket.run(self._records())

    async def _records(self) -> list[CheckpointRecord]:
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for path, size in (await self._bucket.sizes()).items():
            directory, _, name = path.partition("/")
            if name and directory.startswith("step-"):
                found[directory][name] = size
        limit = asyncio.Semaphore(_READS_AT_ONCE)

        async def judge(directory: str) -> CheckpointRecord:
            async with limit:
                return await self._judge(directory, found[directory])

        whole = [name for name, sizes in found.items() if not _is_leftover(sizes)]
        records = await asyncio.gather(*map(judge, whole))
        return sorted(records, key=lambda record: (-record.step, record.path.name))

    async def _judge(self, directory: str, sizes: dict[str, int]) -> CheckpointRecord:
        step, path = catalog.step_of(directory), self._where / directory
        if step < 0:
            return CheckpointRecord(
                step=-1, path=path, problem=f"{directory!r} is not the name of a checkpoint"
            )
        try:
            manifest = await self._manifest(directory)
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

    async def _manifest(self, directory: str) -> Manifest:
        try:
            data = await self._bucket.get(f"{directory}/{MANIFEST_NAME}", LARGEST)
        except MissingError:
            raise CheckpointError(
                f"no {MANIFEST_NAME}: not a checkpoint, or one that was never finished"
            ) from None
        return decode(data, self._key)

    def verify(self, record: CheckpointRecord) -> list[str]:
        return bucket.run(self._verify(record.path.name))

    async def _verify(self, directory: str) -> list[str]:
        step = catalog.step_of(directory)
        sizes = await self._bucket.sizes(directory)
        try:
            manifest = await self._manifest(directory)
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
        return sorted(problems + [problem for problem in await asyncio.gather(*checks) if problem])

    # ------------------------------------------------------------------ reading

    def fetch(
        self, record: CheckpointRecord, into: Path, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Path:
        manifest = record.manifest
        if manifest is None or record.problem is not None:
            raise CheckpointError(record.problem or f"no {MANIFEST_NAME}")
        try:
            bucket.run(self._fetch(record.path.name, manifest, into), cancelled, grace=0)
        except OSError as error:
            raise StorageError(
                f"writing {error.filename or into} failed: {error.strerror or error}"
            ) from error
        return into

    async def _fetch(self, directory: str, manifest: Manifest, into: Path) -> None:
        limit = asyncio.Semaphore(_READS_AT_ONCE)

        async def part(fd: int, name: str, start: int, length: int) -> None:
            async with limit:
                data = await self._patient.range(f"{directory}/{name}", start, length)
                await asyncio.to_thread(os.pwrite, fd, data, start)

        async def file(name: str, entry: FileEntry) -> None:
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                starts = range(0, entry.bytes, PART)
                await asyncio.gather(
                    *(part(fd, name, start, min(PART, entry.bytes - start)) for start in starts)
                )
            finally:
                os.close(fd)
            # read back: what counts is what the ranks will map
            if await asyncio.to_thread(hash_file, target, self._key) != entry:
                raise CheckpointError(f"{name}: digest does not match")

        try:
            await asyncio.gather(*(file(name, entry) for name, entry in manifest.files.items()))
        except MissingError as error:
            raise CheckpointError(f"an object is missing: {error}") from None

    # ------------------------------------------------------------------ writing

    def drain(
        self,
        source: Path,
        origin: Origin,
        *,
        fence: Callable[[], None] = no_fence,
        bandwidth: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Manifest:
        try:
            sizes = payload(source)
            if METADATA_NAME not in sizes:
                raise CheckpointError(f"{source} has no {METADATA_NAME}: not a DCP checkpoint")
            pace = None if bandwidth is None else Pace(bandwidth)
            return bucket.run(
                self._drain(source, sizes, origin, fence, Feed(pace, cancelled), cancelled), cancelled
            )
        except OSError as error:
            raise StorageError(
                f"reading {error.filename or source} failed: {error.strerror or error}"
            ) from error

    async def _drain(
        self,
        source: Path,
        sizes: dict[str, int],
        origin: Origin,
        fence: Callable[[], None],
        feed: Feed,
        cancelled: Callable[[], bool],
    ) -> Manifest:
        directory = catalog.step_directory(self._where, origin.step).name
        fence()
        if (existing := await self._make_room(directory)) is not None:
            return existing
        marker = _marker(Owner(origin.run_id, origin.epoch))
        await self._claim(directory, marker)
        try:
            files = await self._upload(source, sizes, directory, fence, feed)
            manifest = Manifest(origin=origin, files=files)
            if cancelled():
                raise CancelledError(f"the drain to {self._where / directory} was cancelled")
            fence()
            await self._commit(directory, encode(manifest, self._key), marker)
        except (StorageError, CheckpointError):
            await self._clean(directory, marker)
            raise
        return manifest

    async def _make_room(self, directory: str) -> Manifest | None:
        """The manifest of a good checkpoint of that step; else see that the prefix is free, or a leftover."""
        place = self._where / directory
        names = {path.partition("/")[2] for path in await self._bucket.sizes(directory)}
        if MANIFEST_NAME not in names:
            if names and PARTIAL_NAME not in names:
                raise StorageError(f"{place} holds files that are not a checkpoint of ours: not overwritten")
            return None
        try:
            manifest = await self._manifest(directory)
            if not await self._verify(directory):
                return manifest
            owner = Owner(manifest.origin.run_id, manifest.origin.epoch)
        except ForeignError as error:
            raise StorageError(f"{place} cannot be judged, so it is not overwritten: {error}") from None
        except CheckpointError:
            owner = Owner("", 0)
        await self._discard(directory, owner)
        return None

    async def _claim(self, directory: str, marker: bytes) -> None:
        """Create the marker; a leftover of this job is removed first. Raises StorageError when it is another's."""
        name, place = f"{directory}/{PARTIAL_NAME}", self._where / directory
        ours = _owner(marker)
        while True:
            try:
                return await self._bucket.put(name, marker, create=True)
            except TakenError:
                pass
            try:
                found = await self._bucket.get(name, _LARGEST_MARKER)
            except MissingError:
                continue
            if found == marker:  # ours: the answer to the first request was lost
                return None
            theirs = _owner(found)
            if theirs.run_id != ours.run_id:
                raise StorageError(
                    f"{place} is being written by another job (run {theirs.run_id or 'unknown'}): "
                    "give each job a --checkpoints of its own, or remove that prefix"
                )
            if theirs.epoch > ours.epoch:
                raise StorageError(f"{place} is being written by a newer supervisor (epoch {theirs.epoch})")
            await self._discard(directory, ours)

    async def _upload(
        self, source: Path, sizes: dict[str, int], directory: str, fence: Callable[[], None], feed: Feed
    ) -> dict[str, FileEntry]:
        limit = asyncio.Semaphore(_FILES_AT_ONCE)

        async def one(name: str) -> FileEntry:
            async with limit:
                fence()
                return await self._bucket.upload(
                    f"{directory}/{name}", source / name, sizes[name], self._key, feed
                )

        names = sorted(sizes, key=lambda name: (-sizes[name], name))
        tasks = [asyncio.ensure_future(one(name)) for name in names]
        try:
            return dict(zip(names, await asyncio.gather(*tasks), strict=True))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _commit(self, directory: str, manifest: bytes, marker: bytes) -> None:
        place = self._where / directory
        try:
            current = await self._bucket.get(f"{directory}/{PARTIAL_NAME}", _LARGEST_MARKER)
        except MissingError:
            current = b""
        if current != marker:
            raise StorageError(f"{place} was taken over by another supervisor: not committed")
        try:
            await self._bucket.put(f"{directory}/{MANIFEST_NAME}", manifest, create=True)
        except TakenError:
            found = await self._bucket.get(f"{directory}/{MANIFEST_NAME}", LARGEST)
            if found != manifest:  # else ours: the answer to the first request was lost
                raise StorageError(f"{place} was committed by another supervisor meanwhile") from None
        except StorageError:
            # not heard: it may have been written all the same, and what is committed must not be cleaned away
            try:
                found = await self._bucket.get(f"{directory}/{MANIFEST_NAME}", LARGEST)
            except MissingError:
                found = b""
            if found != manifest:
                raise
        try:
            await self._bucket.delete([f"{directory}/{PARTIAL_NAME}"])
        except StorageError:
            return  # beside a manifest it means nothing

    # ------------------------------------------------------------------ removing

    async def _clean(self, directory: str, marker: bytes) -> None:
        """Remove what a failed drain has written, if that can be done at once; else a later drain or ``sweep`` does."""
        quick = Bucket(self._store, self._where, replace(self._limits, attempts=1))

        async def work() -> None:
            if await quick.get(f"{directory}/{PARTIAL_NAME}", _LARGEST_MARKER) == marker:
                await self._discard(directory, _owner(marker), only_leftover=True)

        try:
            await asyncio.wait_for(work(), _CLEANING)
        except (TimeoutError, StorageError):
            return

    async def _discard(self, directory: str, owner: Owner, *, only_leftover: bool = False) -> None:
        paths = set(await self._bucket.sizes(directory))
        manifest, marker = f"{directory}/{MANIFEST_NAME}", f"{directory}/{PARTIAL_NAME}"
        if manifest in paths:
            if only_leftover:
                return
            if marker not in paths:
                await self._bucket.put(marker, _marker(owner))
            await self._bucket.delete([manifest])
        await self._bucket.delete(sorted(paths - {manifest, marker}))
        await self._bucket.delete([marker])

    def remove(self, record: CheckpointRecord) -> None:
        origin = record.manifest.origin if record.manifest else None
        owner = Owner(origin.run_id, origin.epoch) if origin else Owner("", 0)
        bucket.run(self._discard(record.path.name, owner))

    def sweep(self, owner: Owner) -> list[Location]:
        return bucket.run(self._sweep(owner))

    async def _sweep(self, owner: Owner) -> list[Location]:
        await self._probe()
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for path, size in (await self._bucket.sizes()).items():
            directory, _, name = path.partition("/")
            found[directory][name] = size
        swept: list[Location] = []
        for directory, sizes in sorted(found.items()):
            if catalog.step_of(directory) < 0 or not _is_leftover(sizes):
                continue
            try:
                whose = _owner(await self._bucket.get(f"{directory}/{PARTIAL_NAME}", _LARGEST_MARKER))
            except MissingError:
                continue
            if whose.run_id == owner.run_id and whose.epoch <= owner.epoch:
                await self._discard(directory, owner, only_leftover=True)
                swept.append(self._where / directory)
        return swept

    async def _probe(self) -> None:
        """Write, read and delete a small object, and see that put-if-absent is honoured. Raises ConfigError."""
        limits = replace(self._limits, attempts=2, timeout=min(self._limits.timeout, _PROBE))
        quick = Bucket(self._store, self._where, limits)
        name, data = f".everstep-probe-{secrets.token_hex(8)}", secrets.token_bytes(16)

        async def work() -> None:
            await quick.put(name, data)
            if await quick.get(name, len(data)) != data:
                raise StorageError(f"what was written to {self._where} reads back as something else")
            try:
                await quick.put(name, data, create=True)
            except TakenError:
                pass
            else:
                raise StorageError(
                    f"{self._where} overwrites what it was told to create (no If-None-Match): unfit for checkpoints"
                )
            await quick.delete([name])

        try:
            await asyncio.wait_for(work(), 2 * limits.timeout)
        except TimeoutError:
            raise ConfigError(
                f"--checkpoints {self._where}: no answer within {2 * limits.timeout:g} s"
            ) from None
        except StorageError as error:
            raise ConfigError(f"--checkpoints {self._where} cannot be used: {error}") from None


def _is_leftover(names: Iterable[str]) -> bool:
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


def _marker(owner: Owner) -> bytes:
    document = {"run_id": owner.run_id, "epoch": owner.epoch, "token": secrets.token_hex(8)}
    return json.dumps(document).encode()


def _owner(marker: bytes) -> Owner:
    """Whose marker it is; nobody's (no run has this id) when it cannot be read."""
    try:
        document = json.loads(marker)
        return Owner(str(document["run_id"]), int(document["epoch"]))
    except (ValueError, KeyError, TypeError):
        return Owner("", 0)
