"""From files to a checkpoint: ``drain`` copies a snapshot to storage, ``seal`` takes files where they are.

Both end in the one commit: every file synced, the manifest written under a temporary name and synced, the fence
asked, the manifest renamed, the directory synced. Before that rename there is no checkpoint, after it there is a
whole one, wherever the process or the machine dies.

Two things follow from how storage fails. A failed ``fsync`` is never simply called again: the kernel has marked the
pages clean, and the second call would report success for data that are lost (so a retry copies the file anew, and
``seal``, which has no source to copy from, does not retry). And a full disk is no passing fault: not retried, the
partial files are removed at once, for the journal is likely to lie on the same disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Final

import tenacity

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
from supervisor.checkpoint.verify import CHUNK, Hasher, hash_file
from supervisor.edge.files import LOCAL, Files, ThrottledFiles, free_bytes
from supervisor.errors import CheckpointError, StorageError

TRANSIENT: Final = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class CancelledError(StorageError):
    """The drain was told to stop; nothing of it is left."""


@dataclass(kw_only=True)
class Retries:
    """How often transient errors are tried again, all files of one drain together, and how long apart."""

    budget: int = 10
    first_wait: float = 0.1  # seconds, doubling
    longest_wait: float = 2.0
    sleep: Callable[[float], None] = time.sleep
    _lock: Lock = field(default_factory=Lock, repr=False)

    def run(self, action: Callable[[], None]) -> None:
        """Do ``action``, again while it raises a transient OSError and the budget lasts."""
        tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, OSError) and e.errno in TRANSIENT),
            stop=self._is_spent,
            wait=tenacity.wait_exponential(multiplier=self.first_wait, max=self.longest_wait),
            sleep=self.sleep,
            reraise=True,
        )(action)

    def _is_spent(self, _state: tenacity.RetryCallState) -> bool:
        with self._lock:
            self.budget -= 1
            return self.budget < 0


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
    A manifest that is already there is replaced. After a failure the files are as they were.
    """
    marked = os.path.lexists(directory / PARTIAL_NAME)
    try:
        sizes = _selected(directory, names)

        def digest(name: str) -> FileEntry:
            return hash_file(directory / name, key, files=files, before_reading=files.sync)

        entries = _in_parallel(digest, sizes, threads, Event())
        for parent in {(directory / name).parent for name in sizes}:
            sync_directory(parent, files=files)
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

    ``bandwidth`` in bytes a second. ``fence`` raises StorageError once a newer epoch exists; it is asked before each
    file and before the commit. When ``destination`` already is a good checkpoint of that step, its manifest is
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
        if (existing := good_checkpoint(destination, origin.step, key)) is not None:
            return existing
        _check_space(destination, needed)
        with Displaced(destination, key, fence, files):
            begin(destination, files=files)
            copy = _Copy(source, destination, sizes, key, fence, cancelled, files, retries or Retries())
            entries = _in_parallel(copy, sizes, threads, copy.stop)
            for parent in {(destination / name).parent for name in sizes}:
                sync_directory(parent, files=files)
            manifest = Manifest(origin=origin, files=entries)
            _commit(destination, manifest, key=key, fence=fence, files=files, retries=copy.retries)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(destination, needed, error) from error
        raise translated(error, "draining to", destination) from error
    return manifest


class _Copy:
    """Copies one file by name, hashing as it goes; one for all threads of a drain."""

    def __init__(
        self,
        source: Path,
        destination: Path,
        sizes: dict[str, int],
        key: Key | None,
        fence: Callable[[], None],
        cancelled: Callable[[], bool],
        files: Files,
        retries: Retries,
    ) -> None:
        self.source = source
        self.destination = destination
        self.sizes = sizes
        self.key = key
        self.fence = fence
        self.cancelled = cancelled
        self.files = files
        self.retries = retries
        self.stop = Event()  # another file has failed
        self.entries: dict[str, FileEntry] = {}

    def __call__(self, name: str) -> FileEntry:
        def attempt() -> None:
            self.fence()
            try:
                self.entries[name] = self._copy(name)
            except OSError as error:
                error.filename = error.filename or str(self.destination / name)
                raise

        self.retries.run(attempt)
        return self.entries[name]

    def _copy(self, name: str) -> FileEntry:
        target = self.destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(
            target
        ):  # what the attempt before left: its pages may be clean, and not on storage
            self.files.remove(target)
        reader = self.files.open(self.source / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            writer = self.files.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
            try:
                entry = self._pump(reader, writer)
                self.files.sync(writer)
            finally:
                os.close(writer)
        finally:
            os.close(reader)
        if entry.bytes != self.sizes[name]:
            raise StorageError(
                f"{self.source / name} changed while it was copied: {entry.bytes} bytes read, "
                f"it had {self.sizes[name]}"
            )
        return entry

    def _pump(self, reader: int, writer: int) -> FileEntry:
        hasher = Hasher(self.key)
        buffer = memoryview(bytearray(CHUNK))
        size = 0
        while count := self.files.read(reader, buffer):
            hasher.update(buffer[:count])
            written = 0
            while written < count:
                if self.stop.is_set() or self.cancelled():
                    raise CancelledError(f"the drain to {self.destination} was cancelled")
                written += self.files.write(writer, buffer[written:count])
            size += count
        return hasher.entry(size)


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


def _in_parallel(
    action: Callable[[str], FileEntry], sizes: dict[str, int], threads: int | None, stop: Event
) -> dict[str, FileEntry]:
    """``action`` of every name, largest file first; the first error sets ``stop`` and is raised."""
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    workers = max(1, min(threads or min(4, os.cpu_count() or 1), len(names)))
    with ThreadPoolExecutor(workers, thread_name_prefix="drain") as pool:
        futures = {name: pool.submit(action, name) for name in names}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: future.result() for name, future in futures.items()}


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
