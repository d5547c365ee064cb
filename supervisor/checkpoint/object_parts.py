"""A checkpoint of several nodes in an object store: every node uploads its files, and the leader puts the manifest.

There is no rename, so the files are uploaded under the names that they keep, and the prefix bears what ``parts`` has in the name
of its directory: ``step-000001200-3-2`` is step 1200 of attempt 3, drained under epoch 2. So

- an upload that ends late, of a node that was cut off or has been given up, is of another prefix, or writes the very bytes that are
  there: an attempt makes a step once, and its snapshot does not change;
- the leader's marker (``objects``) is there before the first file. A node looks for it before it uploads and before it says
  ``part-<rank>.json``, signed like a manifest; the leader looks for it before the manifest, which is put if absent;
- who discards takes the marker over first, then removes what was said of the parts: a leader of an earlier epoch, which still believes in
  them, finds another's marker. Should it have looked a moment before, its manifest names files that are gone, and so is
  not a good checkpoint to anybody;
- a prefix of such a name with neither marker nor manifest is what a late upload left after that: it is never listed, never committed,
  and removed at the next start.
"""

# ruff: noqa: D102 - the methods are explained by the protocol (``in_parts.PartStorage``)

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from supervisor.checkpoint import bucket, catalog
from supervisor.checkpoint.bucket import Bucket, Feed, MissingError, together
from supervisor.checkpoint.commit import no_fence
from supervisor.checkpoint.directory import payload, translated
from supervisor.checkpoint.in_parts import Making
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import LARGEST, MANIFEST_NAME, PARTIAL_NAME, Key, Manifest, Origin, encode
from supervisor.checkpoint.object_writing import LARGEST_MARKER, ObjectWriter, marker_of, owner_of
from supervisor.checkpoint.parts import Part, all_of, decode_part, encode_part, entries_of, part_name
from supervisor.checkpoint.storage import Owner
from supervisor.edge.files import Pace
from supervisor.errors import CancelledError, CheckpointError, StorageError

_PART: Final = re.compile(r"part-(0|[1-9][0-9]*)\.json")


class ObjectParts:
    """Below one prefix of an object store, for ``owner``."""

    def __init__(
        self, objects: Bucket, writer: ObjectWriter, where: Remote, key: Key | None, owner: Owner
    ) -> None:
        self._bucket, self._writer, self._where, self._key, self._owner = objects, writer, where, key, owner

    def begin(
        self, making: Making, *, fence: Callable[[], None], cancelled: Callable[[], bool]
    ) -> Manifest | None:
        directory = _name(making)

        async def work() -> Manifest | None:
            fence()
            if MANIFEST_NAME in await self._sizes(directory):
                existing = await self._writer.make_room(directory, self._owner.run_id)
                if existing is not None:
                    return replace(existing, place=self._where / directory)
            await self._writer.claim(directory, marker_of(self._owner))
            return None

        return bucket.run(work(), cancelled)

    def drain_part(
        self,
        source: Path,
        making: Making,
        names: Iterable[str],
        *,
        rank: int,
        nodes: int,
        origin: Origin,
        bandwidth: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Part:
        directory = _name(making)
        try:
            there = payload(source)
        except OSError as error:
            raise translated(error, "reading", source) from error
        sizes = {name: there[name] for name in names}
        feed = Feed(None if bandwidth is None else Pace(bandwidth), cancelled)

        async def work() -> Part:
            await self._marker(making)
            files = await self._writer.upload(source, sizes, directory, no_fence, feed)
            part = Part(rank=rank, nodes=nodes, origin=origin, files=files)
            await self._marker(making)
            if cancelled():
                raise CancelledError(f"the drain to {self._where / directory} was cancelled")
            await self._bucket.put(f"{directory}/{part_name(rank)}", encode_part(part, self._key))
            return part

        return bucket.run(work(), cancelled, grace=self._bucket.limits.grace)

    def complete(
        self,
        making: Making,
        origin: Origin | None = None,
        *,
        fence: Callable[[], None] = no_fence,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Manifest:
        directory = _name(making)
        place = self._where / directory

        async def work() -> Manifest:
            marker = await self._marker(making)
            found = await self._read_parts(directory)
            if found is None:
                raise CheckpointError(f"{place}: not all nodes have written their part")
            sizes = await self._sizes(directory)
            entries = entries_of(found, sizes, place)
            manifest = Manifest(origin=origin or found[0].origin, files=entries, place=place)
            said = {name for name in sizes if _PART.fullmatch(name)}
            others = sizes.keys() - entries.keys() - said - {PARTIAL_NAME, MANIFEST_NAME}
            await self._bucket.delete([f"{directory}/{name}" for name in sorted(others)])
            if cancelled():
                raise CancelledError(f"the drain to {place} was cancelled")
            fence()
            await self._writer.commit(directory, encode(manifest, self._key), marker)
            try:
                await self._bucket.delete([f"{directory}/{name}" for name in sorted(said)])
            except StorageError:
                return manifest  # beside a manifest they mean nothing
            return manifest

        return bucket.run(work(), cancelled)

    def is_whole(self, making: Making) -> bool:
        return bucket.run(self._read_parts(_name(making))) is not None

    def left(self) -> list[Making]:
        async def work() -> list[Making]:
            found: dict[str, set[str]] = defaultdict(set)
            for path in await self._bucket.sizes():
                directory, _, name = path.partition("/")
                found[directory].add(name)
            makings = []
            for directory, names in found.items():
                named = catalog.parts_named(directory)
                if named is None or MANIFEST_NAME in names:
                    continue
                if PARTIAL_NAME in names:
                    whose = await self._whose(directory)
                    if whose.run_id != self._owner.run_id or whose.epoch > self._owner.epoch:
                        continue
                makings.append(Making(step=named[0], attempt=named[1], epoch=named[2]))
            return makings

        makings = bucket.run(work())
        return sorted(makings, key=lambda making: (making.attempt, making.step, making.epoch), reverse=True)

    def discard(self, making: Making) -> None:
        directory = _name(making)
        marker = f"{directory}/{PARTIAL_NAME}"

        async def work() -> None:
            names = await self._sizes(directory)
            if MANIFEST_NAME in names:
                return
            if PARTIAL_NAME in names:
                await self._bucket.put(marker, marker_of(self._owner))
            said = {name for name in names if _PART.fullmatch(name)}
            for some in (said, names.keys() - said - {PARTIAL_NAME}, names.keys() & {PARTIAL_NAME}):
                await self._bucket.delete([f"{directory}/{name}" for name in sorted(some)])

        bucket.run(work())

    # ------------------------------------------------------------------ what is there

    async def _sizes(self, directory: str) -> dict[str, int]:
        found = await self._bucket.sizes(directory)
        return {path.partition("/")[2]: size for path, size in found.items()}

    async def _whose(self, directory: str) -> Owner:
        try:
            return owner_of(await self._bucket.get(f"{directory}/{PARTIAL_NAME}", LARGEST_MARKER))
        except MissingError:
            return Owner("", 0)

    async def _marker(self, making: Making) -> bytes:
        """The marker that its leader has put. Raises CheckpointError when it is gone, or another's."""
        directory = _name(making)
        try:
            marker = await self._bucket.get(f"{directory}/{PARTIAL_NAME}", LARGEST_MARKER)
        except MissingError:
            marker = b""
        if owner_of(marker) != Owner(self._owner.run_id, making.epoch):
            raise CheckpointError(f"{self._where / directory} is not being written any more")
        return marker

    async def _read_parts(self, directory: str) -> list[Part] | None:
        ranks = [int(match[1]) for name in await self._sizes(directory) if (match := _PART.fullmatch(name))]
        names = [f"{directory}/{part_name(rank)}" for rank in ranks]
        limit = asyncio.Semaphore(8)

        async def get(name: str) -> bytes:
            async with limit:
                return await self._bucket.get(name, LARGEST)

        said = dict(zip(ranks, await together(map(get, names)), strict=True))

        def read(rank: int) -> Part | None:
            if rank not in said:
                return None
            return decode_part(said[rank], rank, self._key, f"{self._where / directory}/{part_name(rank)}")

        return all_of(read)


def _name(making: Making) -> str:
    return catalog.parts_name(making.step, making.attempt, making.epoch)
