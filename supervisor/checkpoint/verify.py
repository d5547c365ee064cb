"""Is a checkpoint whole? Cheaply by its files' sizes, or for certain by their digests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from blake3 import blake3

from supervisor.checkpoint.directory import entry_status
from supervisor.checkpoint.manifest import FileEntry, Key, Manifest, read_manifest
from supervisor.checkpoint.pieces import Piece, piece_size
from supervisor.edge.files import LOCAL, Files
from supervisor.edge.threads import each
from supervisor.errors import CancelledError, CheckpointError

_UNREADABLE: Final = "cannot be read"
CHUNK: Final = 1 << 20  # bytes, per thread: stays in the cache between read, hash and write


class UnreadableError(CheckpointError):
    """Storage did not give the bytes to judge by; they may be good."""


class Hasher:
    """The digest of one file of ``size`` bytes, given from its begin to its end; large updates are spread over ``threads``.

    ``whole``: that of its bytes, however many pieces it has (a manifest of version 1 has no other).
    """

    def __init__(self, key: Key | None, size: int, *, threads: int = 1, whole: bool = False) -> None:
        self._key, self._threads = key, threads
        self._piece = sys.maxsize if whole else piece_size(size)
        self._room = self._piece
        self._hash = self._new()
        self._pieces: list[bytes] = []  # that are full, and not the last

    def _new(self) -> blake3:
        return hasher(self._key, threads=self._threads)

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        while data:
            if not self._room:
                self._pieces.append(self._hash.digest())
                self._hash, self._room = self._new(), self._piece
            part = data[: self._room]
            self._hash.update(part)
            self._room -= len(part)
            data = data[len(part) :]

    def entry(self, size: int) -> FileEntry:
        """What the manifest says of a file of ``size`` bytes with this content."""
        if not self._pieces:
            return FileEntry(bytes=size, blake3=self._hash.hexdigest())
        pieces = (*self._pieces, self._hash.digest())
        whole = self._new()
        whole.update(b"".join(pieces))
        return FileEntry(bytes=size, blake3=whole.hexdigest(), pieces=tuple(piece.hex() for piece in pieces))


def hasher(key: Key | None, *, threads: int = 1) -> blake3:
    """For files, or parts of them."""
    return blake3(key=key.files, max_threads=threads) if key else blake3(max_threads=threads)


def hash_file(
    path: Path,
    key: Key | None,
    *,
    files: Files = LOCAL,
    threads: int = 1,
    before_reading: Callable[[int], None] | None = None,
    like: FileEntry | None = None,
    over: Callable[[], bool] = lambda: False,
) -> FileEntry:
    """Size and digest of the regular file at ``path``, to be compared with ``like``; raises OSError.

    CancelledError once it is ``over``. ``before_reading`` gets its descriptor.
    """
    buffer = memoryview(bytearray(CHUNK))
    size = 0
    fd = files.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if before_reading is not None:
            before_reading(fd)
        whole = like is not None and not like.pieces
        hasher = Hasher(key, os.fstat(fd).st_size, threads=threads, whole=whole)
        while count := files.read(fd, buffer):
            if over():
                raise CancelledError(f"reading {path} was given up")
            hasher.update(buffer[:count])
            size += count
    finally:
        os.close(fd)
    return hasher.entry(size)


def check_pieces(
    directory: Path,
    pieces: Sequence[Piece],
    key: Key | None,
    over: Callable[[], bool] = lambda: False,
    *,
    files: Files = LOCAL,
    threads: int | None = None,
) -> None:
    """Compare pieces of files. Raises CheckpointError when one is not as it was (UnreadableError when it cannot be read).

    CancelledError once it is ``over``. Nobody who leaves has to wait for its threads.
    """

    def check(piece: Piece) -> None:
        entry_status(directory, piece.name)
        try:
            fd = files.open(directory / piece.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = hash_piece(fd, piece, key, over, files=files)
            finally:
                os.close(fd)
        except OSError as error:
            raise UnreadableError(f"{piece.name}: {_UNREADABLE}: {error.strerror or error}") from error
        if found != piece.blake3:
            raise CheckpointError(f"{piece.name}: digest does not match")

    each(check, pieces, max(1, min(threads or min(4, os.cpu_count() or 1), len(pieces))))


def hash_piece(
    fd: int, piece: Piece, key: Key | None, over: Callable[[], bool] = lambda: False, *, files: Files = LOCAL
) -> str:
    """The hex digest of what lies in an open file where ``piece`` should; raises OSError, CancelledError once it is ``over``."""
    digest, buffer, left = hasher(key), memoryview(bytearray(CHUNK)), piece.length
    os.lseek(fd, piece.start, os.SEEK_SET)
    while left and (count := files.read(fd, buffer[: min(CHUNK, left)])):
        if over():
            raise CancelledError(f"reading {piece.name} was given up")
        digest.update(buffer[:count])
        left -= count
    return digest.hexdigest()


def size_problems(directory: Path, manifest: Manifest) -> list[str]:
    """One line for each file that is missing or has another size. Reads no file."""
    problems = []
    for name, entry in sorted(manifest.files.items()):
        try:
            size = entry_status(directory, name).st_size
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if size < entry.bytes:
            problems.append(f"{name}: truncated, {size} of {entry.bytes} bytes")
        elif size > entry.bytes:
            problems.append(f"{name}: {size} bytes, {entry.bytes} expected")
    return problems


def problems_of(
    directory: Path,
    manifest: Manifest,
    key: Key | None,
    *,
    files: Files = LOCAL,
    threads: int | None = None,
    over: Callable[[], bool] = lambda: False,
) -> list[str]:
    """One line for each file that is not as the manifest says; files that it does not name do not matter.

    Raises CancelledError once it is ``over``.
    """
    problems = size_problems(directory, manifest)
    bad = {problem.partition(":")[0] for problem in problems}
    names = sorted(set(manifest.files) - bad, key=lambda name: -manifest.files[name].bytes)
    cores = threads or min(4, os.cpu_count() or 1)
    workers = max(1, min(cores, len(names)))

    def check(name: str) -> str | None:
        try:
            found = hash_file(
                directory / name,
                key,
                files=files,
                threads=max(1, cores // workers),
                like=manifest.files[name],
                over=over,
            )
        except OSError as error:
            return f"{name}: {_UNREADABLE}: {error.strerror or error}"
        if found == manifest.files[name]:
            return None
        links = entry_status(directory, name).st_nlink
        return f"{name}: digest does not match" + (f" (shared by {links} checkpoints)" if links > 1 else "")

    def note(name: str) -> None:
        if (problem := check(name)) is not None:
            problems.append(problem)

    each(note, names, workers)
    return sorted(problems)


def verify_directory(
    directory: Path, key: Key | None, *, files: Files = LOCAL, threads: int | None = None
) -> Manifest:
    """The manifest of a checkpoint whose every byte was checked.

    Raises CheckpointError with all problems in one line, ForeignError when its manifest is not for us, UnreadableError
    when files could not be read and nothing else is wrong.
    """
    manifest = read_manifest(directory, key)
    problems = problems_of(directory, manifest, key, files=files, threads=threads)
    if problems:
        unreadable = all(_UNREADABLE in problem for problem in problems)
        raise (UnreadableError if unreadable else CheckpointError)("; ".join(problems))
    return manifest
