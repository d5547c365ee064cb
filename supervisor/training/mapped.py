"""Reading tensors straight out of mapped files: no archive is opened and nothing unpickled, where that is provably the same.

The archive of a contiguous tensor begins with a head that depends on shape and dtype alone (``layout``). Where the bytes
in the file are that head, to the last one, the data follow it, and are copied into the target: only the part that this
rank needs, several at a time. Every other archive (another version of torch wrote it, stock DCP did, its tensor is no
plain one) goes the stock way.

Nothing here trusts a length: what the index says was checked against the files' sizes when it was read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from supervisor.training.layout import Archive, tensor_archive

_PIECE: Final = 32 << 20  # bytes that one thread copies at a time
_THREADS: Final = 4


class MappedReader(FileSystemReader):
    """A stock reader of ``directory`` whose index was read already, and that copies what it can."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._directory = directory
        self._metadata = metadata
        self._maps: dict[str, torch.Tensor] = {}
        self.copied = 0  # tensors that were not unpickled

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index that was given."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what can be copied; leave the rest to the stock reader."""
        rest: list[ReadItem] = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        done: list[tuple[ReadItem, torch.Tensor]] = []
        for item in plan.items:
            source = self._find(item) if item.type is LoadItemType.TENSOR else None
            if source is None:
                rest.append(item)
                continue
            target = planner.resolve_tensor(item).detach()
            if target.size() != source.size():
                raise AssertionError(f"{item.storage_index} is {source.size()}, its target {target.size()}")
            copies.append((target, source))
            done.append((item, target))
        _copy_all(copies)
        self.copied += len(done)
        for item, target in done:
            planner.commit_tensor(item, target)
        self._maps.clear()
        return super().read_data(LoadPlan(rest, plan.storage_data, plan.planner_data), planner)

    def _find(self, item: ReadItem) -> torch.Tensor | None:
        """The stored tensor (or the part of it that is wanted), where its data lie bare in the file."""
        info = self.storage_data[item.storage_index]
        entry = self._metadata.state_dict_metadata[item.storage_index.fqn]
        shape = _shape_of(entry, item.storage_index)
        if shape is None or info.transform_descriptors or not isinstance(entry, TensorStorageMetadata):
            return None
        archive = _archive(shape, entry.properties.dtype)
        if archive is None or archive.payload == 0 or archive.length != info.length:
            return None
        file = self._file(info.relative_path)
        if file is None or info.offset + info.length > file.numel():
            return None
        begin = info.offset + len(archive.head)
        if ctypes.string_at(file.data_ptr() + info.offset, len(archive.head)) != archive.head:
            return None
        dtype = entry.properties.dtype
        data = file[begin : begin + archive.payload]
        if data.data_ptr() % dtype.itemsize or begin % dtype.itemsize:
            return None
        whole = data.view(dtype).view(shape)
        for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            if offset or length != whole.size(dim):
                whole = whole.narrow(dim, offset, length)
        return whole

    def _file(self, name: str) -> torch.Tensor | None:
        """The file, mapped; None if it cannot be (the stock reader will say why)."""
        if name not in self._maps:
            try:
                fd = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
            try:
                mapped = mmap.mmap(
                    fd, 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0), prot=mmap.PROT_READ
                )
            except (OSError, ValueError):
                return None
            finally:
                os.close(fd)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                self._maps[name] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._maps[name]


def _shape_of(entry: object, index: MetadataIndex) -> tuple[int, ...] | None:
    """The shape of the chunk that is stored under ``index``."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    offset = index.offset or torch.Size([0] * len(entry.size))
    for chunk in entry.chunks:
        if tuple(chunk.offsets) == tuple(offset):
            return tuple(chunk.sizes)
    return None


def _archive(shape: tuple[int, ...], dtype: torch.dtype) -> Archive | None:
    try:
        return tensor_archive(shape, dtype)
    except RuntimeError:  # no tensor of that kind here
        return None


def _copy_all(copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    pieces: list[tuple[int, int, int]] = []
    others: list[tuple[torch.Tensor, torch.Tensor]] = []
    for target, source in copies:
        plain = target.device.type == "cpu" and target.is_contiguous() and source.is_contiguous()
        if plain and target.dtype == source.dtype and not (target.is_conj() or target.is_neg()):
            size = target.numel() * target.element_size()
            to, begin = target.data_ptr(), source.data_ptr()
            pieces += [(to + at, begin + at, min(_PIECE, size - at)) for at in range(0, size, _PIECE)]
        else:
            others.append((target, source))
    threads = min(_THREADS, os.cpu_count() or 1, len(pieces))
    if sum(size for _, _, size in pieces) > _PIECE and threads > 1:
        shares = [sorted(pieces)[number::threads] for number in range(threads)]
        with ThreadPoolExecutor(threads, thread_name_prefix="everstep-restore") as pool:
            list(pool.map(_copy_pieces, shares))
    else:
        _copy_pieces(pieces)
    with torch.no_grad():
        for target, source in others:
            target.copy_(source)


def _copy_pieces(pieces: list[tuple[int, int, int]]) -> None:
    for piece in pieces:
        ctypes.memmove(*piece)
