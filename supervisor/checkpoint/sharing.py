"""Files that a new checkpoint has in common with the one before are stored once: a hard link instead of a copy.

What is unchanged from one checkpoint to the next (frozen weights, in a file of their own) then costs its space once,
however many checkpoints hold it. Nothing else needs to know: to a reader a link is a file, ``cp -r`` copies it, and the
inode counts by itself how many checkpoints still have it.

A link is made when a file of the older checkpoint, found by size and a few samples, proves equal to the new file byte by
byte, and the digest of those bytes is the one in the older one's manifest. So a link never leads to a file that is not
what its manifest says, and nothing rests on the samples: they only spare a changed file, the usual case, being read
twice. Where links cannot be made (a file system without them, too many, another owner's file), the file is copied.

The price: damage to a shared file is damage to every checkpoint that has it. The next drain notices, for it compares, and
stores a new copy; ``verify`` says how many have it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

from blake3 import blake3

from supervisor.checkpoint.catalog import step_directory
from supervisor.checkpoint.directory import entry_status
from supervisor.checkpoint.manifest import FileEntry, Key, Manifest, read_manifest
from supervisor.checkpoint.verify import CHUNK, Hasher
from supervisor.edge.files import Files, link
from supervisor.errors import CheckpointError

#: bytes; for less it is not worth that one damage be that of several checkpoints
SMALLEST: Final = 1 << 20
_SAMPLES: Final = 32
_SAMPLE: Final = 4096  # bytes

Link = Callable[[Path, Path], bool]


class Sharing:
    """What the files in ``source`` have in common with an older checkpoint. Safe for several threads."""

    def __init__(
        self,
        source: Path,
        sizes: Mapping[str, int],
        older: Path,
        manifest: Manifest,
        key: Key | None,
        files: Files,
        link: Link = link,
    ) -> None:
        self._source = source
        self._older = older
        self._manifest = manifest
        self._key = key
        self._files = files
        self._link = link
        #: the older file that each new one seems to equal
        self.likely = self._search(sizes)

    def _search(self, sizes: Mapping[str, int]) -> dict[str, str]:
        wanted = {size for size in sizes.values() if size >= SMALLEST}
        known: dict[tuple[int, bytes], str] = {}
        for name, entry in self._manifest.files.items():
            if entry.bytes in wanted and (samples := self._samples(self._older, name, entry.bytes)):
                known[entry.bytes, samples] = name
        found = {}
        held = {entry.bytes for entry in self._manifest.files.values()}
        for name, size in sizes.items():
            if size < SMALLEST or size not in held:
                continue
            samples = self._samples(self._source, name, size)
            if samples and (old := known.get((size, samples))):
                found[name] = old
        return found

    def _samples(self, directory: Path, name: str, size: int) -> bytes | None:
        """A digest of a few places of a file; None when it is not there as a file of that size."""
        digest = blake3()
        try:
            if entry_status(directory, name).st_size != size:
                return None
            fd = self._files.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                for number in range(_SAMPLES):
                    digest.update(os.pread(fd, _SAMPLE, (size - _SAMPLE) * number // (_SAMPLES - 1)))
            finally:
                os.close(fd)
        except (OSError, CheckpointError):
            return None
        return digest.digest()

    def adopt(self, name: str, target: Path, check: Callable[[], None]) -> FileEntry | None:
        """Link the older file to ``target`` if it equals the source's ``name``; None when it has to be copied.

        ``check`` is called between pieces and may raise. Raises OSError when the source cannot be read.
        """
        old = self.likely.get(name)
        if old is None:
            return None
        known = self._manifest.files[old]
        entry = self._compare(self._source / name, self._older / old, known, check)
        if entry is None or entry != known or not self._link(self._older / old, target):
            return None
        return entry

    def _compare(self, new: Path, old: Path, known: FileEntry, check: Callable[[], None]) -> FileEntry | None:
        """What a manifest says of both files, in the way in which ``known`` does; None when they differ or the old one cannot be read."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        reader = self._files.open(new, flags)
        try:
            try:
                other = self._files.open(old, flags)
            except OSError:
                return None
            try:
                hasher = Hasher(self._key, known.bytes, whole=not known.pieces)
                return self._compare_open(reader, other, hasher, check)
            finally:
                os.close(other)
        finally:
            os.close(reader)

    def _compare_open(
        self, reader: int, other: int, hasher: Hasher, check: Callable[[], None]
    ) -> FileEntry | None:
        # bytearrays, because those are compared by memcmp and memoryviews are not
        ours, theirs = bytearray(CHUNK), bytearray(CHUNK)
        size = 0
        while count := self._fill(reader, ours):
            check()
            try:
                same = self._fill(other, theirs) == count
            except OSError:
                return None
            if not same or (ours != theirs if count == CHUNK else ours[:count] != theirs[:count]):
                return None
            hasher.update(memoryview(ours)[:count])
            size += count
        return hasher.entry(size)

    def _fill(self, fd: int, buffer: bytearray) -> int:
        """Read until the buffer is full or the file is at its end; the bytes read."""
        view = memoryview(buffer)
        filled = 0
        while filled < len(buffer) and (count := self._files.read(fd, view[filled:])):
            filled += count
        return filled


def with_newest(
    source: Path, sizes: Mapping[str, int], destination: Path, key: Key | None, files: Files
) -> Sharing | None:
    """Sharing with the newest checkpoint beside ``destination`` whose manifest is good; None when there is none."""
    try:
        names = os.listdir(destination.parent)
    except OSError:
        return None
    for name in sorted(names, reverse=True):
        path = destination.parent / name
        if not name.startswith("step-") or path == destination or path.is_symlink():
            continue
        try:
            manifest = read_manifest(path, key)
        except CheckpointError:
            continue
        if step_directory(path.parent, manifest.step) == path:
            return Sharing(source, sizes, path, manifest, key, files)
    return None


def on_disk(checkpoints: Iterable[tuple[Path, Collection[str]]]) -> dict[Path, int]:
    """Bytes of disk that each checkpoint (its directory, its files' names) takes beyond those named before it."""
    seen: set[tuple[int, int]] = set()
    taken = {}
    for directory, names in checkpoints:
        taken[directory] = 0
        for name in names:
            try:
                status = entry_status(directory, name)
            except CheckpointError:
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                taken[directory] += status.st_blocks * 512
    return taken
