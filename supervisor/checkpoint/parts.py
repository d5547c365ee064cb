"""A checkpoint that several nodes write, each its own files, and that becomes one by a single rename.

Every node copies its files into ``.incoming-…/files`` beside the checkpoints, syncs them, and then says in ``part-<rank>.json``,
signed like a manifest, what it has copied. When all parts are there, the leader writes the manifest and renames ``files`` to the
checkpoint's name. So

- before the rename there is no checkpoint, and after it a whole one, as with one node (``commit``);
- who is cut off, late, or of an earlier attempt harms nothing: the place bears the step, the attempt and the epoch, and nobody else
  ever writes there; after the rename it is gone, and what is written by path fails;
- parts are durable without a leader. If all nodes have written theirs and then everything went down, the next run finds them and
  makes the checkpoint of them (``complete``).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from supervisor.checkpoint.catalog import step_directory
from supervisor.checkpoint.commit import no_fence
from supervisor.checkpoint.copying import Copy, Retries, in_parallel
from supervisor.checkpoint.directory import payload, sync_directory, translated
from supervisor.checkpoint.displaced import Displaced, good_checkpoint
from supervisor.checkpoint.location import Location
from supervisor.checkpoint.manifest import (
    MANIFEST_NAME,
    METADATA_NAME,
    FileEntry,
    Key,
    Manifest,
    Origin,
    authenticate,
    check_name,
    decode_entry,
    encode,
    sign,
)
from supervisor.checkpoint.sharing import with_newest
from supervisor.edge.files import LOCAL, Files, ThrottledFiles, free_bytes
from supervisor.errors import CheckpointError, StorageError

_FORMAT: Final = "everstep-part"
_VERSION: Final = 2
_INCOMING: Final = re.compile(r"\.incoming-([0-9]+)-([0-9]+)-([0-9]+)")
FILES: Final = "files"


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """The place of one checkpoint in the making: ``step`` of ``attempt``, drained under ``epoch``, by ``nodes`` nodes."""

    checkpoints: Path
    step: int
    attempt: int
    epoch: int

    @property
    def path(self) -> Path:
        """The directory."""
        return self.checkpoints / f".incoming-{self.step}-{self.attempt}-{self.epoch}"

    @property
    def files(self) -> Path:
        """What becomes the checkpoint."""
        return self.path / FILES

    def part(self, rank: int) -> Path:
        """What the node of that rank says of its part."""
        return self.path / part_name(rank)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A node's part: its files, and what the whole is of."""

    rank: int
    nodes: int
    origin: Origin
    files: dict[str, FileEntry]


def drain_part(
    source: Path,
    incoming: Incoming,
    names: Iterable[str],
    *,
    rank: int,
    nodes: int,
    origin: Origin,
    key: Key | None = None,
    bandwidth: float | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    files: Files = LOCAL,
    threads: int | None = None,
) -> Part:
    """Copy ``names`` of ``source`` and say so, durably. Raises StorageError (CancelledError), with nothing said."""
    if bandwidth is not None:
        files = ThrottledFiles(files, bandwidth)
    try:
        there = payload(source)
        sizes = {name: there[name] for name in names}
        incoming.files.mkdir(parents=True, exist_ok=True)
        destination = step_directory(incoming.checkpoints, incoming.step)
        if sum(sizes.values()) > free_bytes(incoming.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(incoming.path))
        sharing = with_newest(source, sizes, destination, key, files)
        copy = Copy(source, incoming.files, sizes, key, no_fence, cancelled, files, Retries(), sharing)
        entries = in_parallel(copy, sizes, threads, copy.stop) if sizes else {}
        part = Part(rank=rank, nodes=nodes, origin=origin, files=entries)
        for directory in (incoming.files, incoming.path, incoming.checkpoints):
            sync_directory(directory, files=files)
        _say(incoming, part, key, files)
    except OSError as error:
        raise translated(error, "draining to", incoming.path) from error
    return part


def complete(
    incoming: Incoming,
    origin: Origin | None = None,
    *,
    key: Key | None = None,
    fence: Callable[[], None] = no_fence,
    files: Files = LOCAL,
) -> Manifest:
    """Make the checkpoint of the parts, which must all be there; of ``origin``, if the parts do not know all of it.

    Raises CheckpointError when one is missing or does not fit the others, StorageError.
    """
    destination = step_directory(incoming.checkpoints, incoming.step)
    try:
        parts = read_parts(incoming, key)
        if parts is None:
            raise CheckpointError(f"{incoming.path}: not all nodes have written their part")
        there = payload(incoming.files)
        entries = entries_of(parts, there, incoming.files)
        manifest = Manifest(origin=origin or parts[0].origin, files=entries)
        if (existing := good_checkpoint(destination, manifest.origin, key, files)) is not None:
            discard(incoming, files=files)
            return existing
        for name in there.keys() - entries.keys():
            files.remove(incoming.files / name)
        with Displaced(destination, key, fence, files):
            _write(incoming.files / MANIFEST_NAME, encode(manifest, key), files)
            sync_directory(incoming.files, files=files)
            fence()
            files.rename(incoming.files, destination)
            sync_directory(incoming.checkpoints, files=files)
        discard(incoming, files=files)
    except OSError as error:
        raise translated(error, "committing", destination) from error
    return manifest


def read_parts(incoming: Incoming, key: Key | None = None) -> list[Part] | None:
    """All parts by rank; None while some are missing. Raises CheckpointError for one that is damaged or does not fit."""
    return all_of(lambda rank: _read(incoming, rank, key))


def all_of(read: Callable[[int], Part | None]) -> list[Part] | None:
    """All parts by rank, each of them ``read``; None while some are missing. Raises CheckpointError for one that does not fit."""
    first = read(0)
    if first is None:
        return None
    parts = [first]
    for rank in range(1, first.nodes):
        part = read(rank)
        if part is None:
            return None
        if (part.nodes, part.origin.step, part.origin.attempt, part.origin.run_id) != (
            first.nodes,
            first.origin.step,
            first.origin.attempt,
            first.origin.run_id,
        ):
            raise CheckpointError(f"{part_name(rank)} is of another checkpoint than {part_name(0)}")
        parts.append(part)
    return parts


def entries_of(parts: Iterable[Part], there: Mapping[str, int], place: Location) -> dict[str, FileEntry]:
    """The files of all parts. Raises CheckpointError when they are no checkpoint, or not what is ``there``, by size."""
    entries: dict[str, FileEntry] = {}
    for part in parts:
        for name, entry in part.files.items():
            if entries.setdefault(name, entry) != entry:
                raise CheckpointError(f"{place}: two nodes have written {name}")
    if METADATA_NAME not in entries:
        raise CheckpointError(f"{place} has no {METADATA_NAME}: not a DCP checkpoint")
    for name, entry in entries.items():
        if there.get(name) != entry.bytes:
            raise CheckpointError(f"{place / name} is not what its node has written")
    return entries


def left(checkpoints: Path) -> list[Incoming]:
    """What was begun there and has not become a checkpoint, newest step first. Raises StorageError."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise translated(error, "listing", checkpoints) from error
    found = [match for name in names if (match := _INCOMING.fullmatch(name))]
    one = [
        Incoming(checkpoints=checkpoints, step=int(m[1]), attempt=int(m[2]), epoch=int(m[3])) for m in found
    ]
    return sorted(one, key=lambda incoming: (incoming.attempt, incoming.step, incoming.epoch), reverse=True)


def discard(incoming: Incoming, *, files: Files = LOCAL) -> None:
    """Remove all of it; gone already is fine. Raises StorageError."""
    try:
        for parent, directories, names in os.walk(incoming.path, topdown=False):
            for name in [*names, *directories]:
                files.remove(Path(parent, name))
        if incoming.path.is_dir():
            files.remove(incoming.path)
    except OSError as error:
        raise translated(error, "removing", incoming.path) from error


def part_name(rank: int) -> str:
    """The name of what a node says of its part."""
    return f"part-{rank}.json"


def encode_part(part: Part, key: Key | None) -> bytes:
    """What a node says of its part, signed."""
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "key": key.id if key else None,
        "rank": part.rank,
        "nodes": part.nodes,
        "origin": asdict(part.origin),
        "files": {name: entry.encode() for name, entry in part.files.items()},
    }
    return sign(document, key)


def _say(incoming: Incoming, part: Part, key: Key | None, files: Files) -> None:
    _write(incoming.part(part.rank), encode_part(part, key), files)
    sync_directory(incoming.path, files=files)


def _write(path: Path, text: bytes, files: Files) -> None:
    partial = path.with_name(f"{path.name}.partial")
    fd = files.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        view = memoryview(text)
        while view:
            view = view[files.write(fd, view) :]
        files.sync(fd)
    finally:
        os.close(fd)
    files.rename(partial, path)


def _read(incoming: Incoming, rank: int, key: Key | None) -> Part | None:
    path = incoming.part(rank)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    return decode_part(data, rank, key, str(path))


def decode_part(data: bytes, rank: int, key: Key | None, path: str) -> Part:
    """What the node of that rank said at ``path``. Raises CheckpointError."""
    document = authenticate(data, key, kind=_FORMAT, newest=_VERSION, name=path)
    try:
        origin = Origin(**document["origin"])
        files = {str(name): decode_entry(name, entry) for name, entry in document["files"].items()}
        part = Part(rank=int(document["rank"]), nodes=int(document["nodes"]), origin=origin, files=files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    for name in part.files:
        check_name(name)
    if part.rank != rank or not 0 <= rank < part.nodes:
        raise CheckpointError(f"{path} is of rank {part.rank} of {part.nodes}")
    return part
