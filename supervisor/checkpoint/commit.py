"""From files to a checkpoint: ``drain`` copies a snapshot to storage, ``seal`` takes files where they are.

Both end in the one commit: every file synced, the manifest written under a temporary name and synced, the fence
asked, the manifest renamed, the directory synced. Before that rename there is no checkpoint, after it there is a
whole one, wherever the process or the machine dies.

A passing error is tried again by copying the file anew (``copying`` says why nothing less will do), so ``seal``, which
has no source to copy from, does not try again. A full disk is no passing error: the partial files are removed at
once, for the journal is likely to lie on the same disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Final

from supervisor.checkpoint.copying import Copy, Retries, in_parallel
from supervisor.checkpoint.directory import begin, payload, sync_directory, translated
from supervisor.checkpoint.displaced import Displaced, good_checkpoint
from supervisor.checkpoint.manifest import (
    MANIFEST_NAME,
    METADATA_NAME,
    PARTIAL_NAME,
    FileEntry,
    Key,
    Manifest,
    Origin,
    encode,
)
from supervisor.checkpoint.sharing import with_newest
from supervisor.checkpoint.verify import hash_file
from supervisor.edge.files import LOCAL, Files, ThrottledFiles, free_bytes
from supervisor.errors import CheckpointError, StorageError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def no_fence() -> None:
    """For those who cannot have a rival: every epoch may commit."""


def seal(
    directory: Path,
    origin: Origin,
    *,
    key: Key | None = None,
    fence: Callable[[], None] = no_fence,
    names: Iterable[str] | None = None,
    files: Files = LOCAL,
    threads: int | None = None,
) -> Manifest:
    """Make a checkpoint of the DCP files in ``directory`` (all of them, or ``names``).

    Raises StorageError when storage fails or ``fence`` refuses, CheckpointError when the files are no DCP checkpoint.
    A manifest that is already there is replaced. After a failure before the commit the directory is as it was.
    """
    marked = os.path.lexists(directory / PARTIAL_NAME)
    try:
        sizes = _selected(directory, names)

        def digest(name: str) -> FileEntry:
            return hash_file(directory / name, key, files=files, before_reading=files.sync)

        entries = in_parallel(digest, sizes, threads, Event())
        _sync_directories(directory, sizes, files)
        manifest = Manifest(origin=origin, files=entries)
        _commit(directory, manifest, key=key, fence=fence, files=files, retries=Retries())
    except BaseException as error:
        if not marked:  # what was not marked as ours must not be swept as ours
            with contextlib.suppress(OSError):
                files.remove(directory / PARTIAL_NAME)
        if isinstance(error, OSError):
            raise translated(error, "sealing", directory) from error
        raise
    return manifest


def drain(
    source: Path,
    destination: Path,
    origin: Origin,
    *,
    key: Key | None = None,
    fence: Callable[[], None] = no_fence,
    bandwidth: float | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    names: Iterable[str] | None = None,
    files: Files = LOCAL,
    threads: int | None = None,
    retries: Retries | None = None,
) -> Manifest:
    """Copy the files in ``source`` (all of them, or ``names``) to ``destination`` and commit them there.

    What the newest checkpoint beside it has as well is linked, not copied (see ``sharing``).
    ``bandwidth`` in bytes a second. ``fence`` raises StorageError once a newer epoch exists; it is asked before each
    file and before the commit. When ``destination`` already is a good checkpoint of that step and run, its manifest is
    returned and nothing is written. Raises StorageError (CancelledError when ``cancelled`` said so) with nothing
    left behind and nothing older touched, CheckpointError when the source is no DCP checkpoint.
    """
    if bandwidth is not None:
        files = ThrottledFiles(files, bandwidth)
    needed = 0
    try:
        sizes = _selected(source, names)
        needed = sum(sizes.values())
        fence()
        if (existing := good_checkpoint(destination, origin, key, files)) is not None:
            return existing
        sharing = with_newest(source, sizes, destination, key, files)
        needed -= sum(sizes[name] for name in sharing.likely) if sharing is not None else 0
        _check_space(destination, needed)
        with Displaced(destination, key, fence, files):
            begin(destination, files=files)
            copy = Copy(
                source, destination, sizes, key, fence, cancelled, files, retries or Retries(), sharing
            )
            entries = in_parallel(copy, sizes, threads, copy.stop)
            _sync_directories(destination, sizes, files)
            manifest = Manifest(origin=origin, files=entries)
            _commit(destination, manifest, key=key, fence=fence, files=files, retries=copy.retries)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(destination, needed, error) from error
        raise translated(error, "draining to", destination) from error
    return manifest


# --------------------------------------------------------------------------- the commit


def _commit(
    directory: Path,
    manifest: Manifest,
    *,
    key: Key | None,
    fence: Callable[[], None],
    files: Files,
    retries: Retries,
) -> None:
    text = encode(manifest, key)

    def attempt() -> None:
        fd = files.open(directory / PARTIAL_NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
        try:
            view = memoryview(text)
            while view:
                view = view[files.write(fd, view) :]
            files.sync(fd)
        finally:
            os.close(fd)
        fence()
        files.rename(directory / PARTIAL_NAME, directory / MANIFEST_NAME)
        sync_directory(directory, files=files)

    retries.run(attempt)


def _sync_directories(directory: Path, names: Iterable[str], files: Files) -> None:
    """Make the names of all files durable, before the manifest speaks of them."""
    below = {parent for name in names for parent in PurePosixPath(name).parents}
    for parent in sorted(below, reverse=True):
        sync_directory(directory / parent, files=files)


def _selected(directory: Path, names: Iterable[str] | None) -> dict[str, int]:
    sizes = payload(directory)
    if names is not None:
        wanted = set(names)
        if missing := sorted(wanted - set(sizes)):
            raise CheckpointError(f"{directory} lacks {', '.join(missing)}")
        sizes = {name: sizes[name] for name in wanted}
    if METADATA_NAME not in sizes:
        raise CheckpointError(f"{directory} has no {METADATA_NAME}: not a DCP checkpoint")
    return sizes


def _check_space(destination: Path, needed: int) -> None:
    """Refuse at once what cannot fit: filling the disk first would hurt whoever else writes to it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    if needed > free_bytes(destination.parent):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))


def _full(destination: Path, needed: int, error: OSError) -> StorageError:
    free = free_bytes(destination.parent)
    limit = " (so a quota or the inodes ran out, or another writer made room since)" if free >= needed else ""
    reason = error.strerror or "storage is full"
    return StorageError(
        f"{reason}: checkpoint {destination} needs {needed} bytes, {free} are free there{limit}"
    )
