"""Writing a snapshot: the seam where engines differ, and the engine that is stock DCP.

Whatever writes, the files are a stock DCP checkpoint: one file per rank, and ``.metadata`` in the form that torch 2.11 to
2.15 all read.
"""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
import io
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.errors import StorageError, UsageError
from supervisor.training.items import Items, settled
from supervisor.training.world import World

#: errors of the objects in the state, not of the place where it goes
_UNSAVABLE: Final = (
    pickle.PicklingError,
    TypeError,
    AttributeError,
    NotImplementedError,
    ValueError,
    UsageError,
)

#: what the ranks agree on (``SnapshotWriter.ask``): each is ready to copy, or there is more to be agreed on
READY: Final = 0
ASK: Final = 1

Gather = Callable[[], Items]
Finished = Callable[["Written | StorageError | None"], None]


@dataclass(frozen=True)
class Written:
    """What one rank wrote, in bytes, and the seconds that the training stood for it.

    On rank 0, also the names of the files that all ranks wrote.
    """

    bytes: int
    seconds: float
    names: frozenset[str] = frozenset()


class UnsavableError(StorageError):
    """What no later save will mend: something in the state cannot be saved at all."""


class TornError(StorageError):
    """This rank's copy changed under way: the snapshot is no good, though the other ranks may not know that."""


class StaleError(TornError):
    """This rank's state is not laid out as it was any more, and that was noticed too late for this snapshot."""


class SnapshotWriter(Protocol):
    """Writes snapshots, all ranks together.

    ``write`` is called by every rank at the same step. What the ranks have to agree on before it may be small, and be agreed
    on together with other things: ``ask`` says what this rank wants, and ``write`` is told the maximum over all ranks. It reports the outcome through ``finished``: at once, or with
    ``behind`` perhaps later (an engine that copies behind the next step), but always on the thread of the training and
    before the next ``write`` returns. An outcome is alike on all ranks, StorageError everywhere if any rank failed, but for
    TornError, which a rank has for itself. None: not now, ask again after another step (never without ``behind``).
    """

    def ask(self, gather: Gather, *, behind: bool = False) -> int:
        """What to agree on before the next ``write``. Not collective, and raises nothing.

        What ``gather`` returns may leave looks for later (``Items.later``).
        """
        ...

    def write(
        self,
        directory: Path,
        gather: Gather,
        finished: Finished,
        *,
        behind: bool = False,
        agreed: int = ASK,
    ) -> None:
        """Write what ``gather`` returns into ``directory``, instead of its former contents.

        ``agreed`` is the maximum of what the ranks said to ``ask`` just before; without it, they agree here.
        """
        ...

    @property
    def is_busy(self) -> bool:
        """Whether an outcome is outstanding."""
        ...

    def poll(self) -> None:
        """Report what has finished meanwhile; never blocks."""
        ...

    def flush(self) -> None:
        """Wait until nothing is under way. Not collective."""
        ...

    def close(self) -> None:
        """As ``flush``, and for good."""
        ...


class DcpWriter:
    """``torch.distributed.checkpoint.save``, synchronously, without fsync (who makes it durable syncs)."""

    def __init__(self, world: World, *, cleans: bool) -> None:
        """``cleans``: whether this rank removes the directory's former contents (one rank per directory does)."""
        self._world = world
        self._cleans = cleans

    is_busy = False

    def ask(self, gather: Gather, *, behind: bool = False) -> int:
        """DCP does it."""
        return ASK

    def write(
        self,
        directory: Path,
        gather: Gather,
        finished: Finished,
        *,
        behind: bool = False,
        agreed: int = ASK,
    ) -> None:
        """As the protocol says; the outcome is there when it returns."""
        started = time.monotonic()
        planner = PlannerOfItems(gather, directory, cleans=self._cleans)
        storage = Storage(directory)
        outcome = save_with_dcp(storage, planner, self._world.group)
        if isinstance(outcome, StorageError):
            with contextlib.suppress(OSError):
                for name in _files_of(directory, self._world.rank):
                    (directory / name).unlink()
                if self._world.rank == 0:
                    (directory / ".metadata").unlink(missing_ok=True)
                    (directory / ".metadata.tmp").unlink(missing_ok=True)
            finished(outcome)
            return
        size = sum((directory / name).stat().st_size for name in _files_of(directory, self._world.rank))
        finished(Written(size, time.monotonic() - started, frozenset(storage.names)))

    def poll(self) -> None:
        """Nothing is ever under way."""

    def flush(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Nothing is held."""


def save_with_dcp(
    storage: FileSystemWriter, planner: DefaultSavePlanner, group: dist.ProcessGroup | None
) -> Metadata | StorageError:
    """Plan and write, all ranks of ``group`` together; the index, or the error, alike on all, if any of them failed."""
    try:
        with _no_warnings():
            metadata: Metadata = dcp_save(
                {}, storage_writer=storage, planner=planner, process_group=group, no_dist=group is None
            )
    except CheckpointException as error:
        return failure_of({rank: cause for rank, (cause, _) in error.failures.items()})
    return metadata


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Of DCP's. (What a thread would put back might be what another has set meanwhile: there, they are left in place.)"""
    keeping = threading.current_thread() is threading.main_thread()
    with warnings.catch_warnings() if keeping else contextlib.nullcontext():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        yield


def failure_of(causes: Mapping[int, BaseException]) -> StorageError:
    """What a failed save is reported as: an UnsavableError if, on any rank, the state itself is at fault."""
    for rank, cause in causes.items():
        if isinstance(cause, _UNSAVABLE):
            return UnsavableError(described(rank, cause))
    return StorageError(described(*next(iter(causes.items()))))


def described(rank: int, cause: BaseException) -> str:
    """What went wrong, and where."""
    return f"rank {rank}: {type(cause).__name__}: {cause}"


class PlannerOfItems(DefaultSavePlanner):
    """Stock planning of items that are flat already.

    Gathering them happens here, where DCP turns one rank's exception into a failure on all ranks. So does the clearing of
    the directory: every rank writes only after the plans of all, and so all clearing, are through. Until then it is nobody
    else's: an empty directory that another rank makes would be taken for a leftover, and removed.
    """

    def __init__(self, gather: Gather, directory: Path, *, cleans: bool) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self._gather = gather
        self._directory = directory
        self._cleans = cleans

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Gather; then clear."""
        items = settled(self._gather).whole()
        if self._cleans:
            self._directory.mkdir(parents=True, exist_ok=True)
            self.clear()
        self.state_dict = items.values
        self.mappings = items.paths
        self.is_coordinator = is_coordinator

    def clear(self) -> None:
        """Remove what a former snapshot left."""
        _clear(self._directory)


class Storage(FileSystemWriter):
    """Stock files; the index without what differs between versions of torch or Python, or tells where it was written."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=False, thread_count=1)
        self.names: set[str] = set()  # of all ranks' files, on the rank that writes the index

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leaves the directory to the rank that clears it."""
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """All ranks have planned. Where ranks do not share the directory it is still missing here."""
        Path(self.path).mkdir(parents=True, exist_ok=True)
        return super().write_data(plan, planner)

    def storage_meta(self) -> StorageMeta:
        """Nothing that differs from run to run but the id."""
        return StorageMeta(save_id=self.save_id)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, which torch 2.11 would complete in a copy of ``metadata`` only."""
        stored = {result.index: result.storage_data for of_rank in results for result in of_rank}
        metadata.storage_data, metadata.storage_meta = stored, self.storage_meta()
        metadata.version = CURRENT_DCP_VERSION
        published = self.published(metadata)
        self.names = {".metadata", *(info.relative_path for info in published.storage_data.values())}
        put_index(Path(self.path), portable(published))

    def published(self, metadata: Metadata) -> Metadata:
        """What of the index is written."""
        return metadata


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is TensorProperties:
            # five fields everywhere up to 2.14; those that a newer torch adds have defaults
            properties: Any = obj
            fields = properties.__getstate__()
            return copyreg.__newobj__, (TensorProperties,), fields[:5]  # type: ignore[attr-defined]
        return NotImplemented


def mark_of(metadata: Metadata) -> bytes:
    """What files bear in their stamps that belong to this index; an index made by others may have none."""
    meta = metadata.storage_meta
    return hashlib.sha256(str(meta.save_id if meta is not None else None).encode()).digest()[:16]


def put_index(directory: Path, index: bytes) -> None:
    """Write ``.metadata``, whole or not at all."""
    temporary = directory / ".metadata.tmp"
    temporary.write_bytes(index)
    temporary.rename(directory / ".metadata")


def portable(metadata: Metadata) -> bytes:
    """``metadata`` pickled so that torch 2.11 to 2.15 read it."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(metadata)
    return buffer.getvalue()


def _files_of(directory: Path, rank: int) -> list[str]:
    return [
        name for name in os.listdir(directory) if name.startswith(f"__{rank}_") and name.endswith(".distcp")
    ]


def _clear(directory: Path) -> None:
    """Remove a former snapshot, what declares it whole first."""
    for name in (SLOT_NAME, ".metadata", *os.listdir(directory)):
        if name in (SLOT_NAME, ".metadata", ".metadata.tmp") or name.endswith(".distcp"):
            (directory / name).unlink(missing_ok=True)
