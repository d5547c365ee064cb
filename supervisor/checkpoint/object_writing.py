"""Writing checkpoints to an object store: claim the step, upload, commit; and removal. See ``objects`` for the theory."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

from supervisor.checkpoint import catalog
from supervisor.checkpoint.abandoned import abort_uploads
from supervisor.checkpoint.bucket import Bucket, Feed, MissingError, TakenError, together
from supervisor.checkpoint.location import Location, Remote
from supervisor.checkpoint.manifest import (
    LARGEST,
    MANIFEST_NAME,
    PARTIAL_NAME,
    FileEntry,
    ForeignError,
    Key,
    Manifest,
    Origin,
    encode,
)
from supervisor.checkpoint.object_reading import ObjectReader, is_leftover
from supervisor.checkpoint.storage import Owner
from supervisor.errors import CancelledError, CheckpointError, ConfigError, StorageError

FILES_AT_ONCE: Final = 2
_PROBE: Final = 20.0  # seconds at most
_CLEANING: Final = 2.0  # times what settling may take: for removing what a failed drain has written
LARGEST_MARKER: Final = 4096  # bytes


class ObjectWriter:
    """The writing half. Its coroutines raise StorageError."""

    def __init__(self, objects: Bucket, quick: Bucket, where: Remote, key: Key | None) -> None:
        self._bucket = objects
        self._quick = quick  # tries nothing twice
        self._where = where
        self._key = key
        self._reader = ObjectReader(objects, where, key)

    async def drain(
        self,
        source: Path,
        sizes: dict[str, int],
        origin: Origin,
        fence: Callable[[], None],
        feed: Feed,
        cancelled: Callable[[], bool],
    ) -> Manifest:
        """As ``CheckpointStorage.drain``, of the files ``sizes``."""
        directory = catalog.step_directory(self._where, origin.step).name
        fence()
        marker = marker_of(Owner(origin.run_id, origin.epoch))
        while True:
            if (existing := await self.make_room(directory, origin.run_id)) is not None:
                return existing
            await self.claim(directory, marker)
            if f"{directory}/{MANIFEST_NAME}" not in await self._bucket.sizes(directory):
                break
            # somebody has committed between that look and our claim, which was free again: his files are not for us
            await self._bucket.delete([f"{directory}/{PARTIAL_NAME}"])
        try:
            files = await self.upload(source, sizes, directory, fence, feed)
            manifest = Manifest(origin=origin, files=files)
            if cancelled():
                raise CancelledError(f"the drain to {self._where / directory} was cancelled")
            fence()
            await self.commit(directory, encode(manifest, self._key), marker)
        except (StorageError, CheckpointError):
            await self._clean(directory, marker)
            raise
        return manifest

    async def make_room(self, directory: str, run_id: str) -> Manifest | None:
        """The manifest of a good checkpoint of that step and run; else see that the prefix is free, or a leftover."""
        place = self._where / directory
        names = {path.partition("/")[2] for path in await self._bucket.sizes(directory)}
        if MANIFEST_NAME not in names:
            if names and PARTIAL_NAME not in names:
                raise StorageError(f"{place} holds files that are not a checkpoint of ours: not overwritten")
            return None
        try:
            manifest = await self._reader.manifest(directory)
            if manifest.origin.run_id != run_id:
                raise StorageError(
                    f"{place} is a checkpoint of another job (run {manifest.origin.run_id}): give each job a --checkpoints of its own"
                )
            if not await self._reader.verify(directory):
                return manifest
            owner = Owner(manifest.origin.run_id, manifest.origin.epoch)
        except ForeignError as error:
            raise StorageError(f"{place} cannot be judged, so it is not overwritten: {error}") from None
        except CheckpointError:
            owner = Owner("", 0)
        await self.discard(directory, owner)
        return None

    async def claim(self, directory: str, marker: bytes) -> None:
        """Create the marker; a leftover of this job is removed first. Raises StorageError when it is another's."""
        name, place = f"{directory}/{PARTIAL_NAME}", self._where / directory
        ours = owner_of(marker)
        while True:
            try:
                return await self._bucket.put(name, marker, create=True)
            except TakenError:
                pass
            try:
                found = await self._bucket.get(name, LARGEST_MARKER)
            except MissingError:
                continue
            if found == marker:  # ours: the answer to the first request was lost
                return None
            theirs = owner_of(found)
            if theirs.run_id != ours.run_id:
                raise StorageError(
                    f"{place} is being written by another job (run {theirs.run_id or 'unknown'}): "
                    "give each job a --checkpoints of its own, or remove that prefix"
                )
            if theirs.epoch > ours.epoch:
                raise StorageError(f"{place} is being written by a newer supervisor (epoch {theirs.epoch})")
            await self.discard(directory, ours)

    async def upload(
        self, source: Path, sizes: dict[str, int], directory: str, fence: Callable[[], None], feed: Feed
    ) -> dict[str, FileEntry]:
        """Upload the files ``sizes``; what the manifest says of them."""
        limit = asyncio.Semaphore(FILES_AT_ONCE)

        async def one(name: str) -> FileEntry:
            async with limit:
                try:
                    fence()
                    return await self._bucket.upload(
                        f"{directory}/{name}", source / name, sizes[name], self._key, feed
                    )
                except BaseException:
                    feed.stop()
                    raise

        names = sorted(sizes, key=lambda name: (-sizes[name], name))
        return dict(
            zip(names, await together(map(one, names), settling=self._bucket.limits.settling), strict=True)
        )

    async def commit(self, directory: str, manifest: bytes, marker: bytes) -> None:
        """Put the manifest if there is none, and take the marker away, which must be ``marker`` still."""
        place = self._where / directory
        try:
            current = await self._bucket.get(f"{directory}/{PARTIAL_NAME}", LARGEST_MARKER)
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
        """Remove what a failed drain has written, if that can be done at once; else a later drain or ``sweep`` does.

        The marker stays: a request that was given up may yet be carried out, and what it leaves must not look like
        somebody else's. The next drain of the step takes it over, the next start sweeps it.
        """

        async def work() -> None:
            if await self._quick.get(f"{directory}/{PARTIAL_NAME}", LARGEST_MARKER) == marker:
                paths = await self._quick.sizes(directory)
                if f"{directory}/{MANIFEST_NAME}" not in paths:
                    await self._quick.delete(sorted(paths.keys() - {f"{directory}/{PARTIAL_NAME}"}))

        try:
            await asyncio.wait_for(work(), _CLEANING * self._bucket.limits.settling)
        except (TimeoutError, StorageError):
            return

    async def discard(self, directory: str, owner: Owner, *, only_leftover: bool = False) -> None:
        """Remove a checkpoint or a leftover, its manifest first and its marker last."""
        paths = set(await self._bucket.sizes(directory))
        manifest, marker = f"{directory}/{MANIFEST_NAME}", f"{directory}/{PARTIAL_NAME}"
        if manifest in paths:
            if only_leftover:
                return
            if marker not in paths:
                await self._bucket.put(marker, marker_of(owner))
            await self._bucket.delete([manifest])
        await self._bucket.delete(sorted(paths - {manifest, marker}))
        await self._bucket.delete([marker])

    async def sweep(self, owner: Owner) -> list[Location]:
        """As ``CheckpointStorage.sweep``."""
        await self.probe()
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for path, size in (await self._bucket.sizes()).items():
            directory, _, name = path.partition("/")
            found[directory][name] = size
        swept: list[Location] = []
        others: set[str] = set()
        for directory, sizes in sorted(found.items()):
            if catalog.step_of(directory) < 0 or not is_leftover(sizes):
                continue
            try:
                whose = owner_of(await self._bucket.get(f"{directory}/{PARTIAL_NAME}", LARGEST_MARKER))
            except MissingError:
                continue
            if whose.run_id == owner.run_id and whose.epoch <= owner.epoch:
                if catalog.parts_named(directory) is not None:
                    continue  # it may be whole: ``object_parts``
                await self.discard(directory, owner, only_leftover=True)
                swept.append(self._where / directory)
            else:
                others.add(directory)
        await self._abort_uploads(others)
        return swept

    async def _abort_uploads(self, others: set[str]) -> None:
        """Have the server forget the parts of uploads that a killed supervisor has begun; not those of ``others``."""

        def is_ours(name: str) -> bool:
            directory = name.partition("/")[0]
            return catalog.step_of(directory) >= 0 and directory not in others

        timeout = self._quick.limits.timeout
        try:
            await asyncio.to_thread(abort_uploads, self._where, is_ours, timeout=timeout)
        except (OSError, ET.ParseError):
            return  # they cost money, not correctness

    async def probe(self) -> None:
        """Write, read and delete a small object, and see that put-if-absent is honoured. Raises ConfigError."""
        quick, patience = self._quick, min(2 * self._quick.limits.timeout, _PROBE)
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
            await asyncio.wait_for(work(), patience)
        except TimeoutError:
            raise ConfigError(f"--checkpoints {self._where}: no answer within {patience:g} s") from None
        except StorageError as error:
            raise ConfigError(f"--checkpoints {self._where} cannot be used: {error}") from None


def marker_of(owner: Owner) -> bytes:
    """A new marker: no two are alike."""
    document = {"run_id": owner.run_id, "epoch": owner.epoch, "token": secrets.token_hex(8)}
    return json.dumps(document).encode()


def owner_of(marker: bytes) -> Owner:
    """Whose marker it is; nobody's (no run has this id) when it cannot be read."""
    try:
        document = json.loads(marker)
        return Owner(str(document["run_id"]), int(document["epoch"]))
    except (ValueError, KeyError, TypeError):
        return Owner("", 0)
