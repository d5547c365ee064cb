"""Checkpoints in an object store: the same files under the same names, without rename and without fsync.

An object store has neither directories nor rename, and an object appears whole or not at all. So the commit is the upload of
the manifest, last, if-absent. Until then a *marker* (``everstep.json.partial``, which says whose it is) tells that a prefix
is being written; a removal starts with the marker and then takes the manifest. At any instant, whatever a crash left,

- ``everstep.json`` is there: it was whole when it was committed (and ``verify`` says whether it still is);
- only the marker is there: a leftover, never listed, removed by ``sweep`` if it is this job's;
- other objects without either: not ours, never touched.

**Two writers.** The marker is created if-absent, so of two that begin the same step one goes on; it looks for a manifest once
more, as the other may have committed, and taken its marker away, in between. A later supervisor of the
same job (a higher epoch) takes the marker over; the older one finds out, from the job directory before each file and from
the marker before its manifest, and gives up. What cannot be excluded without a rename: an upload that the older one has
begun before it lost the job may end after the newer one's manifest, and replace one of its files. Its digest then does not
match, so that checkpoint is found damaged and skipped for the one before; no wrong byte is ever loaded.
"""

# ruff: noqa: D102 - the methods are explained by the protocol (``storage.CheckpointStorage``)

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from obstore.store import ObjectStore

from supervisor.checkpoint import bucket
from supervisor.checkpoint.bucket import Bucket, Feed, Limits
from supervisor.checkpoint.catalog import CheckpointRecord, manifest_of
from supervisor.checkpoint.commit import no_fence
from supervisor.checkpoint.directory import payload
from supervisor.checkpoint.location import Location, Remote
from supervisor.checkpoint.manifest import METADATA_NAME, Key, Manifest, Origin
from supervisor.checkpoint.object_parts import ObjectParts
from supervisor.checkpoint.object_reading import Folder, ObjectReader
from supervisor.checkpoint.object_writing import ObjectWriter
from supervisor.checkpoint.on_demand import Obtain, OnDemand
from supervisor.checkpoint.pieces import Piece
from supervisor.checkpoint.storage import Owner
from supervisor.edge import memory
from supervisor.edge.files import Pace
from supervisor.errors import CheckpointError, StorageError

#: what resumes can do nothing else meanwhile: it is more patient than a drain, which comes again with the next snapshot
_PATIENCE: Final = 10  # times the timeout


@contextlib.contextmanager
def _local_problems(into: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"writing {error.filename or into} failed: {error.strerror or error}") from error


class ObjectStorage:
    """One prefix of an object store. Every call has a loop of its own, in the thread that makes it."""

    def __init__(self, store: ObjectStore, where: Remote, key: Key | None, limits: Limits) -> None:
        def attached(**changes: float) -> Bucket:
            return Bucket(store, where, replace(limits, **changes))  # type: ignore[arg-type]

        self._where = where
        self._reader = ObjectReader(attached(), where, key)
        self._patient = ObjectReader(attached(attempts=100, patience=_PATIENCE * limits.timeout), where, key)
        self._objects, self._key = attached(), key
        self._writer = ObjectWriter(attached(), attached(attempts=1), where, key)

    @classmethod
    def at(cls, where: Remote, key: Key | None, *, timeout: float) -> ObjectStorage:
        """The one that a URL names. Raises ConfigError; asks nobody yet."""
        limits = Limits(timeout=timeout)
        return cls(bucket.connect(where, limits), where, key, limits)

    @property
    def where(self) -> Location:
        return self._where

    def records(self) -> list[CheckpointRecord]:
        return bucket.run(self._reader.records())

    def find(self, name: str) -> CheckpointRecord | None:
        return bucket.run(self._reader.record(name))

    def verify(self, record: CheckpointRecord, *, cancelled: Callable[[], bool] = lambda: False) -> list[str]:
        return bucket.run(self._patient.verify(record.path.name), cancelled, grace=0)

    def fetch(
        self, record: CheckpointRecord, into: Path, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Path:
        manifest = manifest_of(record)
        obtain = self._obtain(record.path.name, manifest, into)
        obtain([piece for name, entry in manifest.files.items() for piece in entry.cut(name)], cancelled)
        return into

    def on_demand(
        self, record: CheckpointRecord, into: Path, *, cancelled: Callable[[], bool] = lambda: False
    ) -> OnDemand:
        manifest = manifest_of(record)
        return OnDemand(into, manifest, self._obtain(record.path.name, manifest, into), cancelled)

    def _obtain(self, name: str, manifest: Manifest, into: Path) -> Obtain:
        with _local_problems(into):
            folder = Folder(into, manifest.files)

        def obtain(pieces: Sequence[Piece], cancelled: Callable[[], bool]) -> None:
            with _local_problems(into):
                needed = sum(piece.length for piece in pieces)
                if needed > (free := memory.room(into)):
                    raise StorageError(f"there is no room to fetch {needed} bytes: {free} free in {into}")
                bucket.run(self._patient.fetch(name, pieces, folder), cancelled, grace=0)

        return obtain

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
        except OSError as error:
            raise StorageError(
                f"reading {error.filename or source} failed: {error.strerror or error}"
            ) from error
        if METADATA_NAME not in sizes:
            raise CheckpointError(f"{source} has no {METADATA_NAME}: not a DCP checkpoint")
        feed = Feed(None if bandwidth is None else Pace(bandwidth), cancelled)
        work = self._writer.drain(source, sizes, origin, fence, feed, cancelled)
        return bucket.run(work, cancelled, grace=self._objects.limits.grace)

    def parts(self, owner: Owner) -> ObjectParts:
        return ObjectParts(self._objects, self._writer, self._where, self._key, owner)

    def remove(self, record: CheckpointRecord) -> None:
        origin = record.manifest.origin if record.manifest else None
        owner = Owner(origin.run_id, origin.epoch) if origin else Owner("", 0)
        bucket.run(self._writer.discard(record.path.name, owner))

    def set_aside(self, records: Sequence[CheckpointRecord]) -> Location | None:
        for record in records:  # there is no rename
            self.remove(record)
        return None

    def sweep(self, owner: Owner) -> list[Location]:
        return bucket.run(self._writer.sweep(owner))
