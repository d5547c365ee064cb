"""The seam between what is done with checkpoints and where they lie: a directory, or an object store.

What a ``CheckpointStorage`` promises, wherever it keeps them:

- ``drain`` commits a whole checkpoint or none: until its manifest is there, nothing of it is listed, and a kill at any
  instant leaves what was there before;
- ``fetch`` gives files of which every byte was compared with the manifest, ``on_demand`` those bytes that are asked for;
- ``remove`` takes the manifest first;
- no call waits for ever: what does not answer is a StorageError, and ``cancelled`` is heeded within a second or two.
  (A directory whose server hangs is the kernel's to wait for. The supervisor does not wait for such a thread.)

One supervisor writes at a time. How far a rival is kept out differs: ``commit`` and ``objects`` say how.
"""

# ruff: noqa: D102 - the methods are explained by the protocol

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from supervisor.checkpoint import catalog, commit
from supervisor.checkpoint.catalog import CheckpointRecord
from supervisor.checkpoint.in_parts import DirectoryParts, PartStorage
from supervisor.checkpoint.location import TIMEOUT, Location, Remote
from supervisor.checkpoint.manifest import Key, Manifest, Origin
from supervisor.checkpoint.on_demand import OnDemand
from supervisor.checkpoint.pieces import Piece
from supervisor.checkpoint.verify import check_pieces
from supervisor.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Owner:
    """Who writes: a job by its run id, and which of its supervisors."""

    run_id: str
    epoch: int


class CheckpointStorage(Protocol):
    """One job's checkpoints in one place. Calls block: make them from a thread."""

    @property
    def where(self) -> Location:
        """The place."""
        ...

    def records(self) -> list[CheckpointRecord]:
        """Every checkpoint, newest first, judged by its manifest and its files' sizes. Raises StorageError."""
        ...

    def find(self, name: str) -> CheckpointRecord | None:
        """That of the checkpoint called ``name``, without a look at any other; None: there is none. Raises StorageError."""
        ...

    def verify(self, record: CheckpointRecord, *, cancelled: Callable[[], bool] = lambda: False) -> list[str]:
        """Every problem of a checkpoint, one line each; empty when every byte is as it was. Raises StorageError."""
        ...

    def drain(
        self,
        source: Path,
        origin: Origin,
        *,
        fence: Callable[[], None] = commit.no_fence,
        bandwidth: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Manifest:
        """Copy the DCP files in ``source`` and commit them as the checkpoint of ``origin.step``.

        ``bandwidth`` in bytes a second. Raises StorageError (CancelledError when ``cancelled`` said so) with nothing
        older touched, CheckpointError when the source is no DCP checkpoint.
        """
        ...

    def parts(self, owner: Owner) -> PartStorage:
        """The same place, for checkpoints that several nodes write."""
        ...

    def fetch(
        self, record: CheckpointRecord, into: Path, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Path:
        """A directory with the checkpoint, each byte checked: its own, or ``into``, which the caller removes.

        Raises CheckpointError when it is damaged, StorageError when storage does not give it.
        """
        ...

    def on_demand(
        self, record: CheckpointRecord, into: Path, *, cancelled: Callable[[], bool] = lambda: False
    ) -> OnDemand:
        """The same, but what nobody asks for is neither fetched nor compared. ``cancelled`` counts until this returns.

        Raises CheckpointError when it is damaged as far as that is seen from its index, StorageError.
        """
        ...

    def remove(self, record: CheckpointRecord) -> None:
        """Delete a checkpoint, manifest first; gone already is fine. Raises StorageError."""
        ...

    def set_aside(self, records: Sequence[CheckpointRecord]) -> Location | None:
        """Remove checkpoints that are bad, though whole; the first is kept under another name where that can be: its place.

        One that was kept before is removed then. Raises StorageError.
        """
        ...

    def sweep(self, owner: Owner) -> list[Location]:
        """Find out that ``owner`` can read and write, and remove what its unfinished drains and removals have left.

        Precondition: the caller holds the job's lock and drains nothing now. Raises ConfigError where it can be told that
        the place cannot be used, StorageError.
        """
        ...


@dataclass(frozen=True)
class LocalStorage:
    """A directory of this host or of a mounted file system (``commit`` has the guarantees)."""

    where: Path
    key: Key | None = None

    def records(self) -> list[CheckpointRecord]:
        return catalog.list_checkpoints(self.where, self.key)

    def find(self, name: str) -> CheckpointRecord | None:
        return catalog.find(self.where / name, self.key)

    def verify(self, record: CheckpointRecord, *, cancelled: Callable[[], bool] = lambda: False) -> list[str]:
        return catalog.verify(record, self.key, over=cancelled)

    def drain(
        self,
        source: Path,
        origin: Origin,
        *,
        fence: Callable[[], None] = commit.no_fence,
        bandwidth: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Manifest:
        return commit.drain(
            source,
            catalog.step_directory(self.where, origin.step),
            origin,
            key=self.key,
            fence=fence,
            bandwidth=bandwidth,
            cancelled=cancelled,
        )

    def parts(self, owner: Owner) -> DirectoryParts:
        return DirectoryParts(self.where, self.key)

    def fetch(
        self, record: CheckpointRecord, into: Path, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Path:
        if problems := self.verify(record, cancelled=cancelled):
            raise CheckpointError("; ".join(problems))
        return catalog.local(record)

    def on_demand(
        self, record: CheckpointRecord, into: Path, *, cancelled: Callable[[], bool] = lambda: False
    ) -> OnDemand:
        path, manifest = catalog.local(record), catalog.manifest_of(record)

        def compare(pieces: Sequence[Piece], over: Callable[[], bool]) -> None:
            check_pieces(path, pieces, self.key, over)

        return OnDemand(path, manifest, compare, cancelled)

    def remove(self, record: CheckpointRecord) -> None:
        catalog.remove(record)

    def set_aside(self, records: Sequence[CheckpointRecord]) -> Location | None:
        return catalog.set_aside(records)

    def sweep(self, owner: Owner) -> list[Location]:
        return list(catalog.sweep(self.where))


def open_storage(where: Location, key: Key | None, *, timeout: float = TIMEOUT) -> CheckpointStorage:
    """The storage at ``where``. Raises ConfigError when what it needs is not installed or not configured."""
    if not isinstance(where, Remote):
        return LocalStorage(where, key)
    try:
        from supervisor.checkpoint.objects import ObjectStorage
    except ImportError as error:
        raise ConfigError(
            f"{where}: object stores need the extra [cloud]: pip install 'everstep[cloud]' ({error})"
        ) from None
    return ObjectStorage.at(where, key, timeout=timeout)
