"""Copying a checkpoint's files in parallel, hashed on the way, with passing errors tried again.

A failed ``fsync`` is never simply called again: the kernel has marked the pages clean, and the second call would
report success for data that are lost. So what is tried again is the copy of the whole file, to a new one.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Final

import tenacity

from supervisor.checkpoint.manifest import FileEntry, Key
from supervisor.checkpoint.sharing import Sharing
from supervisor.checkpoint.verify import CHUNK, Hasher
from supervisor.edge.files import Files
from supervisor.errors import CancelledError, StorageError

TRANSIENT: Final = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT})


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


class Copy:
    """Copies (or links) one file by name, hashing as it goes; one for all threads of a drain."""

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
        sharing: Sharing | None = None,
    ) -> None:
        self.source = source
        self.destination = destination
        self.sizes = sizes
        self.key = key
        self.fence = fence
        self.cancelled = cancelled
        self.files = files
        self.retries = retries
        self.sharing = sharing
        self.stop = Event()  # another file has failed
        self.entries: dict[str, FileEntry] = {}

    def __call__(self, name: str) -> FileEntry:
        """Copy and sync one file; what the manifest says of it. Raises OSError, StorageError."""

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
        if self.sharing is not None and (shared := self.sharing.adopt(name, target, self._check)) is not None:
            return shared
        reader = self.files.open(self.source / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            writer = self.files.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
            try:
                entry = self._pump(reader, writer, self.sizes[name])
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

    def _pump(self, reader: int, writer: int, expected: int) -> FileEntry:
        hasher = Hasher(self.key, expected)
        buffer = memoryview(bytearray(CHUNK))
        size = 0
        while count := self.files.read(reader, buffer):
            hasher.update(buffer[:count])
            written = 0
            while written < count:
                self._check()
                written += self.files.write(writer, buffer[written:count])
            size += count
        return hasher.entry(size)

    def _check(self) -> None:
        if self.stop.is_set() or self.cancelled():
            raise CancelledError(f"the drain to {self.destination} was cancelled")


def in_parallel(
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
