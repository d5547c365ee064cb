"""Reading tensors straight out of files: no archive is opened and nothing unpickled, where that is provably the same.

The archive of a contiguous tensor begins with a head that depends on shape and dtype alone (``layout``). Where the bytes
in the file are that head, to the last one, the data follow it, and are read into the target: only the part that this
rank needs, several at a time, with no memory in between. Every other archive (another version of torch wrote it, stock DCP
did, its tensor is no plain one) goes the stock way.

A file in memory is mapped and copied from, which its huge pages (``edge/huge``) make twice as fast as reading it. Any other is
read: setting up the pages of a mapping costs as much as the copy, and storage that fails would end the process by SIGBUS where
a read raises OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from supervisor.edge import huge, mounts
from supervisor.training.copies import offsets_of
from supervisor.training.layout import tensor_archive
from supervisor.training.moves import local_of

_PIECE: Final = 16 << 20  # bytes that one thread reads at a time
_THREADS: Final = 4
_HUGE: Final = 2 << 20  # bytes of a huge page
_MADV_HUGEPAGE: Final = 14
_AT_ONCE: Final = 256 << 20  # bytes of tensors that are read beside their targets and then copied

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _File:
    """An open file of a checkpoint. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(self.fd)
            # a file with holes could be too large for what is left of its file system
            whole = 0 < status.st_size <= status.st_blocks * 512
            in_memory = mounts.is_in_memory(path)
            self._mapping = huge.Mapping(self.fd, status.st_size) if whole and in_memory else None
        except BaseException:
            os.close(self.fd)
            raise

    def read(self, offset: int, address: int, size: int) -> None:
        """Put ``size`` bytes to ``address``. Raises OSError, and EOFError where the file is too short."""
        mapping = self._mapping
        if mapping is not None and offset + size <= mapping.size and mapping.is_readable(offset, size):
            ctypes.memmove(address, mapping.address + offset, size)
            return
        memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        while memory:
            count = os.preadv(self.fd, [memory], offset)
            if count == 0:
                raise EOFError("a file is shorter than the index says")
            memory, offset = memory[count:], offset + count

    def close(self) -> None:
        """Nothing of it is used any more."""
        self._mapping = None
        os.close(self.fd)


_Piece = tuple[_File, int, int, int]  # file, its offset, address in memory, bytes
_Shards = dict[object, torch.Size | None]  # by layout, where this rank's part begins; None where it has none


@dataclass(frozen=True)
class _Stored:
    """Where the data of a contiguous tensor lie bare: at ``begin`` of an open file, and which part of it is wanted."""

    file: _File
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: torch.Tensor  # of such a tensor on the meta device

    @property
    def offset(self) -> int:
        """Where the part begins in the file."""
        return self.begin + int(self.part.storage_offset()) * self.dtype.itemsize


class DirectReader(FileSystemReader):
    """A stock reader of ``directory`` whose index was read already, and that copies what it can."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._directory = directory
        self._metadata = metadata
        self.copied = 0  # tensors that were not unpickled

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index that was given."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read straight what can be; leave the rest to the stock reader. Raises OSError, and EOFError for a file too short."""
        with contextlib.ExitStack() as stack:
            files: dict[str, _File] = {}
            rest: list[ReadItem] = []
            found: list[tuple[ReadItem, torch.Tensor, _Stored]] = []
            for item in plan.items:
                stored = self._find(item, files, stack) if item.type is LoadItemType.TENSOR else None
                if stored is None:
                    rest.append(item)
                    continue
                target = planner.resolve_tensor(item).detach()
                if target.size() != stored.part.size():
                    raise AssertionError(
                        f"{item.storage_index} is {stored.part.size()}, its target {target.size()}"
                    )
                found.append((item, target, stored))
            _read_all([(target, stored) for _, target, stored in found])
        self.copied += len(found)
        for item, target, _ in found:
            planner.commit_tensor(item, target)
        return super().read_data(LoadPlan(rest, plan.storage_data, plan.planner_data), planner)

    def read_whole(self, targets: Mapping[str, Any]) -> set[str]:
        """Read, without a plan, each tensor of which this rank wants one stored piece as it is; which those were.

        That is a plain tensor that is stored whole, and a shard as it was saved: all of them, unless the number of ranks has
        changed. DCP's planning of thousands of tensors takes many times as long as reading them. Raises as ``read_data``.
        """
        done: set[str] = set()
        reads: list[tuple[torch.Tensor, _File, int]] = []
        with contextlib.ExitStack() as stack:
            files: dict[str, _File] = {}
            shards: _Shards = {}
            for key, target in targets.items():
                entry = self._metadata.state_dict_metadata.get(key)
                part = _part_of(target, entry, shards)
                if part is None or not isinstance(entry, TensorStorageMetadata):
                    continue
                local, offsets = part
                info = (self._metadata.storage_data or {}).get(MetadataIndex(key, offsets))
                found = self._bare(info, tuple(local.shape), entry.properties.dtype, files, stack)
                if found is not None:
                    reads.append((local, *found))
                    done.add(key)
            pieces = [piece for target, file, begin in reads for piece in _pieces(file, begin, target)]
            with _pool() as pool:
                _read_pieces(pieces, pool)
        self.copied += len(done)
        return done

    def _bare(
        self,
        info: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        files: dict[str, _File],
        stack: contextlib.ExitStack,
    ) -> tuple[_File, int] | None:
        """The open file and where in it the data of a stored tensor begin, if they lie there bare."""
        if info is None or info.transform_descriptors:
            return None
        archive = tensor_archive(shape, dtype)
        if archive is None or archive.payload == 0 or archive.length != info.length:
            return None
        name = info.relative_path
        if name not in files:
            files[name] = _File(self._directory / name)
            stack.callback(files[name].close)
        if os.pread(files[name].fd, len(archive.head), info.offset) != archive.head:
            return None
        return files[name], info.offset + len(archive.head)

    def _find(self, item: ReadItem, files: dict[str, _File], stack: contextlib.ExitStack) -> _Stored | None:
        """Where the stored tensor lies, if its data lie bare in the file."""
        info = self.storage_data[item.storage_index]
        entry = self._metadata.state_dict_metadata[item.storage_index.fqn]
        shape = _shape_of(entry, item.storage_index)
        if shape is None or not isinstance(entry, TensorStorageMetadata):
            return None
        dtype = entry.properties.dtype
        found = self._bare(info, shape, dtype, files, stack)
        if found is None:
            return None
        part = torch.empty(shape, dtype=dtype, device="meta")
        for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            if offset or length != part.size(dim):
                part = part.narrow(dim, offset, length)
        return _Stored(*found, shape, dtype, part)


def _part_of(target: object, entry: object, shards: _Shards) -> tuple[torch.Tensor, torch.Size] | None:
    """This rank's part of a tensor, and where in the whole it begins, if a stored piece like it can be read to where it lies.

    ``shards``: where those begin that were asked for before, as finding that out takes longer than all the rest.
    """
    if not isinstance(entry, TensorStorageMetadata) or not isinstance(target, torch.Tensor):
        return None
    if type(target) not in (torch.Tensor, torch.nn.Parameter, DTensor) or target.shape != entry.size:
        return None
    local = local_of(target)
    offsets: torch.Size | None = torch.Size([0] * len(entry.size))
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        laid_out = target.shape, target.placements, id(mesh)  # the targets keep it alive
        if laid_out not in shards:
            takes_part = mesh.get_coordinate() is not None
            shards[laid_out] = torch.Size(offsets_of(target)) if takes_part else None
        offsets = shards[laid_out]
    fits = (
        local.device.type == "cpu"
        and local.is_contiguous()
        and not (local.is_conj() or local.is_neg())
        and local.dtype == entry.properties.dtype
    )
    return (local, offsets) if fits and offsets is not None else None


def _pool() -> ThreadPoolExecutor:
    """For reading. It starts threads when it needs them."""
    threads = min(_THREADS, os.cpu_count() or 1)
    return ThreadPoolExecutor(threads, thread_name_prefix="everstep-restore")


def _shape_of(entry: object, index: MetadataIndex) -> tuple[int, ...] | None:
    """The shape of the chunk that is stored under ``index``."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    offset = index.offset or torch.Size([0] * len(entry.size))
    for chunk in entry.chunks:
        if tuple(chunk.offsets) == tuple(offset):
            return tuple(chunk.sizes)
    return None


def _read_all(reads: Sequence[tuple[torch.Tensor, _Stored]]) -> None:
    with _pool() as pool:
        pieces: list[_Piece] = []
        indirect: list[tuple[torch.Tensor, _Stored]] = []
        for target, stored in reads:
            plain = target.device.type == "cpu" and target.is_contiguous() and stored.part.is_contiguous()
            if plain and target.dtype == stored.dtype and not (target.is_conj() or target.is_neg()):
                pieces += _pieces(stored.file, stored.offset, target)
            else:
                indirect.append((target, stored))
        _read_pieces(pieces, pool)
        pieces, copies = [], []
        for number, (target, stored) in enumerate(indirect):
            whole = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
            part = stored.part
            pieces += _pieces(stored.file, stored.begin, whole)
            copies.append((target, whole.as_strided(part.size(), part.stride(), part.storage_offset())))
            if sum(piece[3] for piece in pieces) > _AT_ONCE or number == len(indirect) - 1:
                _read_pieces(pieces, pool)
                for into, source in copies:
                    into.copy_(source)
                pieces, copies = [], []


def _pieces(file: _File, offset: int, target: torch.Tensor) -> list[_Piece]:
    size, address = target.numel() * target.element_size(), target.data_ptr()
    if size >= 2 * _HUGE:  # fresh memory is had at half the cost; memory in use is left as it is
        begin = -(-address // _HUGE) * _HUGE
        _madvise(begin, (address + size - begin) // _HUGE * _HUGE, _MADV_HUGEPAGE)
    return [(file, offset + at, address + at, min(_PIECE, size - at)) for at in range(0, size, _PIECE)]


def _read_pieces(pieces: Sequence[_Piece], pool: ThreadPoolExecutor) -> None:
    if sum(size for _, _, _, size in pieces) <= _PIECE:
        _read_each(pieces)
        return
    ordered = sorted(pieces, key=lambda piece: (piece[0].fd, piece[1]))
    list(pool.map(_read_each, [ordered[number::_THREADS] for number in range(_THREADS)]))


def _read_each(pieces: Sequence[_Piece]) -> None:
    for file, *place in pieces:
        file.read(*place)
