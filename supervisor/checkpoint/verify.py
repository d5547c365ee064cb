"""Is a checkpoint whole? Cheaply by its files' sizes, or for certain by their digests."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from blake3 import blake3

from supervisor.checkpoint.directory import entry_status
from supervisor.checkpoint.manifest import FileEntry, Key, Manifest, read_manifest
from supervisor.edge.files import LOCAL, Files
from supervisor.errors import CheckpointError

_UNREADABLE: Final = "cannot be read"
CHUNK: Final = 1 << 20  # bytes, per thread: stays in the cache between read, hash and write


class UnreadableError(CheckpointError):
    """Storage did not give the bytes to judge by; they may be good."""


class Hasher:
    """The digest of one file; large updates are spread over ``threads``."""

    def __init__(self, key: Key | None, *, threads: int = 1) -> None:
        self._hash = blake3(key=key.files, max_threads=threads) if key else blake3(max_threads=threads)

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        self._hash.update(data)

    def entry(self, size: int) -> FileEntry:
        """What the manifest says of a file of ``size`` bytes with this content."""
        return FileEntry(bytes=size, blake3=self._hash.hexdigest())


def hash_file(
    path: Path,
    key: Key | None,
    *,
    files: Files = LOCAL,
    threads: int = 1,
    before_reading: Callable[[int], None] | None = None,
) -> FileEntry:
    """Size and digest of the regular file at ``path``; raises OSError. ``before_reading`` gets its descriptor."""
    hasher = Hasher(key, threads=threads)
    buffer = memoryview(bytearray(CHUNK))
    size = 0
    fd = files.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if before_reading is not None:
            before_reading(fd)
        while count := files.read(fd, buffer):
            hasher.update(buffer[:count])
            size += count
    finally:
        os.close(fd)
    return hasher.entry(size)


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
    directory: Path, manifest: Manifest, key: Key | None, *, files: Files = LOCAL, threads: int | None = None
) -> list[str]:
    """One line for each file that is not as the manifest says; files that it does not name do not matter."""
    problems = size_problems(directory, manifest)
    bad = {problem.partition(":")[0] for problem in problems}
    names = sorted(set(manifest.files) - bad, key=lambda name: -manifest.files[name].bytes)
    cores = threads or min(4, os.cpu_count() or 1)
    workers = max(1, min(cores, len(names)))

    def check(name: str) -> str | None:
        try:
            found = hash_file(directory / name, key, files=files, threads=max(1, cores // workers))
        except OSError as error:
            return f"{name}: {_UNREADABLE}: {error.strerror or error}"
        if found == manifest.files[name]:
            return None
        links = entry_status(directory, name).st_nlink
        return f"{name}: digest does not match" + (f" (shared by {links} checkpoints)" if links > 1 else "")

    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        problems += [problem for problem in pool.map(check, names) if problem is not None]
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
