"""Planning a snapshot once, with DCP's own planner and collectives, into places that later snapshots only fill.

The index (``.metadata``) says of every item in which file, where and how long its archive is. It is made by rank 0 of what
all ranks have laid out, and holds for every slot and every later snapshot of the same layout.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from supervisor.checkpoint import stamps
from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.checkpoint.slots import COPIES
from supervisor.training.copies import is_copy, without_copies
from supervisor.training.items import Items
from supervisor.training.layout import Archive, Room, aligned, new_blob, tensor_archive
from supervisor.training.moves import SMALL, Spot, local_of
from supervisor.training.trees import is_storable
from supervisor.training.writer import PlannerOfItems, Storage

FILES: Final = COPIES + 1  # of a rank


@dataclass(frozen=True)
class TensorPlace:
    """Where the payload of a tensor goes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: int
    offset: int  # of the archive
    archive: Archive

    @property
    def payload(self) -> int:
        """Where the data begins in the file."""
        return self.offset + len(self.archive.head)


@dataclass(frozen=True)
class BlobPlace:
    """Where the archive of anything else goes. ``item`` is set when the planner says what is stored."""

    key: str
    file: int
    offset: int
    room: Room
    item: WriteItem | None


@dataclass
class Layout:
    """What one rank writes into its files, and what it was planned for.

    What stays the same from snapshot to snapshot is in a file of its own, so that a checkpoint can share it with the one
    before.
    """

    names: list[str]
    paths: dict[str, Any]
    signatures: dict[str, object]  # of every tensor item
    constant: frozenset[
        str
    ]  # keys of tensors that do not change from snapshot to snapshot, as far as was seen
    tensors: list[TensorPlace] = field(default_factory=list)  # in the order of the files
    blobs: list[BlobPlace] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [0] * FILES)
    index: bytes | None = None  # ``.metadata``, on rank 0
    all_names: frozenset[str] = frozenset()  # of all ranks' files, on rank 0
    rank: int = 0
    mark: bytes = stamps.NO_LAYOUT  # that its files bear in their stamps, once all ranks have agreed on it

    def stamp(self, number: int, step: int) -> tuple[int, bytes]:
        """Where the stamp of a file goes, and what it is."""
        stamp = stamps.Stamp(self.rank, number, step, self.mark)
        return self.sizes[number] - stamps.SIZE, stamp.encode()

    @property
    def size(self) -> int:
        """Bytes, of all files."""
        return sum(self.sizes)


def file_names(rank: int) -> list[str]:
    """The files that a rank may have, as stock DCP names them: of what changes, of what does not, of copies."""
    return [f"__{rank}_{number}.distcp" for number in range(FILES)]


def signature(value: torch.Tensor) -> object:
    """What of a tensor the plan depends on."""
    if isinstance(value, DTensor):
        local = value._local_tensor
        mesh = value.device_mesh
        return (type(value), value.shape, value.dtype, value.placements, mesh, local.shape, type(local))
    return type(value) in (torch.Tensor, torch.nn.Parameter) or type(value), value.shape, value.dtype


def make_place(directory: Path, ranks: Iterable[int]) -> None:
    """Make the slot's directory, and remove what a job of another shape left in it; files of ``ranks`` are written over."""
    directory.mkdir(parents=True, exist_ok=True)
    ours = {name for rank in ranks for name in file_names(rank)}
    for name in (SLOT_NAME, ".metadata", *os.listdir(directory)):
        if name in (SLOT_NAME, ".metadata", ".metadata.tmp") or (
            name.endswith(".distcp") and name not in ours
        ):
            (directory / name).unlink(missing_ok=True)


class ArenaPlanner(PlannerOfItems):
    """As the stock writer's, but the files of a former snapshot stay, to be written over."""

    def __init__(self, items: Items, directory: Path, *, cleans: bool, ranks: Iterable[int]) -> None:
        super().__init__(lambda: items, directory, cleans=cleans)
        self._ranks = ranks

    def clear(self) -> None:
        """Remove only what would not be written over."""
        make_place(self._directory, self._ranks)


class ArenaStorage(Storage):
    """DCP's side of the first snapshot: takes this rank's plan, lays it out, has it written, and keeps the index.

    ``copies``: whether there may be some.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        items: Items,
        waits: Callable[[torch.Tensor], bool],
        written: Callable[[Layout], None],
        *,
        copies: bool,
    ) -> None:
        super().__init__(directory)
        self._rank = rank
        self._items = items = items.whole()
        self._waits = waits
        self._written = written
        self._copies = copies
        self.layout = Layout(
            file_names(rank),
            dict(items.paths),
            {key: signature(value) for key, value in items.values.items() if isinstance(value, torch.Tensor)},
            frozenset(items.constant),
            rank=rank,
        )

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Lay out this rank's file and fill it."""
        results = _lay_out(plan, planner, self._items, self.layout, self._waits)
        self._written(self.layout)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def published(self, metadata: Metadata) -> Metadata:
        """All of it but copies."""
        return without_copies(metadata) if self._copies else metadata

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index."""
        super().finish(metadata, results)
        self.layout.all_names = frozenset(self.names)
        self.layout.index = (Path(self.path) / ".metadata").read_bytes()


def _lay_out(
    plan: SavePlan,
    planner: SavePlanner,
    items: Items,
    layout: Layout,
    waits: Callable[[torch.Tensor], bool],
) -> list[WriteResult]:
    """Blobs, then large tensors, then small ones: those that are copied together side by side."""
    count = Counter(item.index.fqn for item in plan.items)
    results = []
    tensors: list[tuple[tuple[int, bool, bool, bool], WriteItem, Archive]] = []
    for item in plan.items:
        key = item.index.fqn
        value = items.values[key]
        archive = _archive(item, value) if count[key] == 1 else None
        file = COPIES if is_copy(key) else int(archive is not None and key in items.constant)
        if archive is not None:
            group = file, key in items.constant, archive.payload < SMALL, not waits(local_of(value))
            tensors.append((group, item, archive))
            continue
        by_planner = item if item.type is not WriteItemType.BYTE_IO else None
        data, room = new_blob(planner.resolve_data(item) if by_planner else value)
        offset = aligned(layout.sizes[file], 0)
        layout.blobs.append(BlobPlace(key, file, offset, room, by_planner))
        layout.sizes[file] = offset + len(data)
        results.append(_result(item.index, len(data), layout.names[file], offset, len(data)))
    for (file, *_), item, archive in sorted(tensors, key=operator.itemgetter(0)):
        key = item.index.fqn
        local = local_of(items.values[key])
        offset = aligned(layout.sizes[file], len(archive.head))
        layout.tensors.append(TensorPlace(key, tuple(local.shape), local.dtype, file, offset, archive))
        layout.sizes[file] = offset + archive.length
        results.append(_result(item.index, archive.payload, layout.names[file], offset, archive.length))
    layout.sizes = [aligned(size, 0) + stamps.SIZE if size else 0 for size in layout.sizes]
    return results


def spots(layout: Layout) -> dict[str, Spot]:
    """Where the data of each tensor go, and what lies between them and the next ones."""
    found = {}
    for place, following in zip_longest(layout.tensors, layout.tensors[1:]):
        then = None
        if (
            following is not None
            and following.file == place.file
            and following.payload - place.payload < 2 * SMALL
        ):
            gap = bytes(following.offset - place.offset - place.archive.length)
            then = place.archive.tail + gap + following.archive.head
        found[place.key] = Spot(place.payload, then)
    return found


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
