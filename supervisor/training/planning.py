"""Planning a snapshot once, with DCP's own planner and collectives, into places that later snapshots only fill.

The index (``.metadata``) says of every item in which file, where and how long its archive is. It is made by rank 0 of what
all ranks have laid out, and holds for every slot and every later snapshot of the same layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.training.items import Items
from supervisor.training.layout import Archive, Room, aligned, new_blob, tensor_archive
from supervisor.training.moves import local_of
from supervisor.training.trees import is_storable
from supervisor.training.writer import PlannerOfItems, Storage


@dataclass(frozen=True)
class TensorPlace:
    """Where the payload of a tensor goes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # of the archive
    archive: Archive

    @property
    def payload(self) -> int:
        """Where the data begins in the file."""
        return self.offset + len(self.archive.head)


@dataclass(frozen=True)
class BlobPlace:
    """Where the archive of anything else goes. ``item`` is set when the planner is to say what is stored."""

    key: str
    offset: int
    room: Room
    item: WriteItem | None


@dataclass
class Layout:
    """What one rank writes into its file ``name``, and what it was planned for."""

    name: str
    paths: dict[str, Any]
    signatures: dict[str, object]  # of every tensor item
    tensors: list[TensorPlace] = field(default_factory=list)
    blobs: list[BlobPlace] = field(default_factory=list)
    size: int = 0
    index: bytes | None = None  # ``.metadata``, on rank 0
    names: frozenset[str] = frozenset()  # of all ranks' files, on rank 0


def file_name(rank: int) -> str:
    """The file of a rank, as stock DCP names it."""
    return f"__{rank}_0.distcp"


def signature(value: torch.Tensor) -> object:
    """What of a tensor the plan depends on."""
    if isinstance(value, DTensor):
        local = value._local_tensor
        mesh = value.device_mesh
        return (type(value), value.shape, value.dtype, value.placements, mesh, local.shape, type(local))
    return type(value) in (torch.Tensor, torch.nn.Parameter) or type(value), value.shape, value.dtype


def make_place(directory: Path, ranks: int) -> None:
    """Make the slot's directory, and remove what a job of another shape left in it; files of ranks are written over."""
    directory.mkdir(parents=True, exist_ok=True)
    ours = {file_name(rank) for rank in range(ranks)}
    for name in (SLOT_NAME, ".metadata", *os.listdir(directory)):
        if name in (SLOT_NAME, ".metadata", ".metadata.tmp") or (
            name.endswith(".distcp") and name not in ours
        ):
            (directory / name).unlink(missing_ok=True)


class ArenaPlanner(PlannerOfItems):
    """As the stock writer's, but the files of a former snapshot stay, to be written over."""

    def __init__(self, items: Items, directory: Path, *, cleans: bool, ranks: int) -> None:
        super().__init__(lambda: items, directory, cleans=cleans)
        self._ranks = ranks

    def clear(self) -> None:
        """Remove only what would not be written over."""
        make_place(self._directory, self._ranks)


class ArenaStorage(Storage):
    """DCP's side of the first snapshot: takes this rank's plan, lays it out, has it written, and keeps the index."""

    def __init__(self, directory: Path, rank: int, items: Items, written: Callable[[Layout], None]) -> None:
        super().__init__(directory)
        self._rank = rank
        self._items = items
        self._written = written
        self.layout = Layout(
            file_name(rank),
            dict(items.paths),
            {key: signature(value) for key, value in items.values.items() if isinstance(value, torch.Tensor)},
        )

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Lay out this rank's file and fill it."""
        results = _lay_out(plan, planner, self._items, self.layout)
        self._written(self.layout)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index."""
        super().finish(metadata, results)
        self.layout.names = frozenset(self.names)
        self.layout.index = (Path(self.path) / ".metadata").read_bytes()


def _lay_out(plan: SavePlan, planner: SavePlanner, items: Items, layout: Layout) -> list[WriteResult]:
    results = []
    count: dict[str, int] = {}
    for item in plan.items:
        count[item.index.fqn] = count.get(item.index.fqn, 0) + 1
    for item in plan.items:
        key = item.index.fqn
        value = items.values[key]
        archive = _archive(item, value) if count[key] == 1 else None
        if archive is not None:
            local = local_of(value)
            offset = aligned(layout.size, len(archive.head))
            layout.tensors.append(TensorPlace(key, tuple(local.shape), local.dtype, offset, archive))
            size, length = archive.payload, archive.length
        else:
            by_planner = item if item.type is not WriteItemType.BYTE_IO else None
            data, room = new_blob(planner.resolve_data(item) if by_planner else value)
            offset = aligned(layout.size, 0)
            layout.blobs.append(BlobPlace(key, offset, room, by_planner))
            size = length = len(data)
        layout.size = offset + length
        results.append(_result(item.index, size, layout.name, offset, length))
    return results


def _archive(item: WriteItem, value: Any) -> Archive | None:
    """The archive, if the item is all that this rank holds of a strided tensor, so that its memory can be copied."""
    if item.type is WriteItemType.BYTE_IO or item.tensor_data is None or not is_storable(value):
        return None
    local = local_of(value)
    if type(local) not in (torch.Tensor, torch.nn.Parameter) or not is_storable(local):
        return None
    shape = tuple(local.shape)
    return tensor_archive(shape, local.dtype) if tuple(item.tensor_data.chunk.sizes) == shape else None


def _result(index: MetadataIndex, size: int, name: str, offset: int, length: int) -> WriteResult:
    return WriteResult(index=index, size_in_bytes=size, storage_data=_StorageInfo(name, offset, length))
