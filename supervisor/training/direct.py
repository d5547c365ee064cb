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
from collections.abc import Iterator, Mapping, Sequence
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
from supervisor.training.supply import Supply

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
class _Place:
    """Where a contiguous tensor may lie bare: behind ``head``, at ``offset`` of the file ``name``."""

    name: str
    offset: int
    head: bytes
    payload: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def begin(self) -> int:
        """Of the data."""
        return self.offset + len(self.head)

    def wanted(self, part: torch.Tensor | None) -> Iterator[tuple[str, int, int]]:
        """What is read for a part of it that is contiguous; None: for all of it."""
        yield self.name, self.offset, len(self.head)
        if part is None or part.nelement() * self.dtype.itemsize == self.payload:
            yield self.name, self.begin, self.payload
        else:
            begin = self.begin + int(part.storage_offset()) * self.dtype.itemsize
            yield self.name, begin, part.nelement() * self.dtype.itemsize


@dataclass(frozen=True)
class _Stored:
    """A contiguous tensor that lies bare in an open file, and which part of it is wanted."""

    file: _File
    place: _Place
    part: torch.Tensor  # of such a tensor on the meta device

    @property
    def offset(self) -> int:
        """Where the part begins in the file."""
        return self.place.begin + int(self.part.storage_offset()) * self.part.element_size()


class DirectReader(FileSystemReader):
    """A stock reader of ``directory`` whose index was read already, and that copies what it can.

    ``supply`` has what is read there, if that is not there from the start. What it raises goes through every method, with OSError, and EOFError for a file too short.
    """

    def __init__(self, directory: Path, metadata: Metadata, supply: Supply | None = None) -> None:
        super().__init__(directory)
        self._directory = directory
        self._metadata = metadata
        self._supply = supply or Supply(directory, None)
        self.copied = 0  # tensors that were not unpickled

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index that was given."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read straight what can be; leave the rest to the stock reader."""
        rest: list[ReadItem] = []
        lying: list[tuple[ReadItem, torch.Tensor, _Place, torch.Tensor]] = []
        for item in plan.items:
            found = self._find(item) if item.type is LoadItemType.TENSOR else None
            if found is None:
                rest.append(item)
                continue
            target = planner.resolve_tensor(item).detach()
            if target.size() != found[1].size():
                raise AssertionError(f"{item.storage_index} is {found[1].size()}, its target {target.size()}")
            lying.append((item, target, *found))
        self._supply.bring(
            wanted
            for _, target, place, part in lying
            for wanted in place.wanted(part if _is_plain(target, part) else None)
        )
        direct: list[tuple[ReadItem, torch.Tensor, _Stored]] = []
        with contextlib.ExitStack() as stack:
            files = _Files(self._directory, stack)
            for item, target, place, part in lying:
                if (file := files.bare(place)) is None:
                    rest.append(item)
                else:
                    direct.append((item, target, _Stored(file, place, part)))
            _read_all([(target, stored) for _, target, stored in direct])
        self.copied += len(direct)
        for item, target, _ in direct:
            planner.commit_tensor(item, target)
        infos = [self.storage_data[item.storage_index] for item in rest]
        self._supply.bring((info.relative_path, info.offset, info.length) for info in infos)
        return super().read_data(LoadPlan(rest, plan.storage_data, plan.planner_data), planner)

    def read_whole(self, targets: Mapping[str, Any]) -> set[str]:
        """Read, without a plan, each tensor of which this rank wants one stored piece as it is; which those were.

        That is a plain tensor that is stored whole, and a shard as it was saved: all of them, unless the number of ranks has
        changed. DCP's planning of thousands of tensors takes many times as long as reading them.
        """
        lying: list[tuple[str, torch.Tensor, _Place]] = []
        shards: _Shards = {}
        for key, target in targets.items():
            entry = self._metadata.state_dict_metadata.get(key)
            part = _part_of(target, entry, shards)
            if part is None or not isinstance(entry, TensorStorageMetadata):
                continue
            local, offsets = part
            info = (self._metadata.storage_data or {}).get(MetadataIndex(key, offsets))
            place = _place_of(info, tuple(local.shape), entry.properties.dtype)
            if place is not None:
                lying.append((key, local, place))
        self._supply.bring(wanted for _, _, place in lying for wanted in place.wanted(None))
        done: set[str] = set()
        pieces: list[_Piece] = []
        with contextlib.ExitStack() as stack:
            files = _Files(self._directory, stack)
            for key, local, place in lying:
                if (file := files.bare(place)) is not None:
                    pieces += _pieces(file, place.begin, local)
                    done.add(key)
            with _pool() as pool:
                _read_pieces(pieces, pool)
        self.copied += len(done)
        return done

    def _find(self, item: ReadItem) -> tuple[_Place, torch.Tensor] | None:
        """Where the stored tensor lies, if its data may lie bare in the file, and which part of it is wanted."""
        info = self.storage_data[item.storage_index]
        entry = self._metadata.state_dict_metadata[item.storage_index.fqn]
        shape = _shape_of(entry, item.storage_index)
        if shape is None or not isinstance(entry, TensorStorageMetadata):
            return None
        place = _place_of(info, shape, entry.properties.dtype)
        if place is None:
            return None
        part = torch.empty(shape, dtype=place.dtype, device="meta")
        for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            if offset or length != part.size(dim):
                part = part.narrow(dim, offset, length)
        return place, part


class _Files:
    """The files of one reading, opened when they are first asked for."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory, self._stack = directory, stack
        self._open: dict[str, _File] = {}

    def bare(self, place: _Place) -> _File | None:
        """The open file, if the data lie bare there indeed."""
        file = self._open.get(place.name)
        if file is None:
            file = self._open[place.name] = _File(self._directory / place.name)
            self._stack.callback(file.close)
        return file if os.pread(file.fd, len(place.head), place.offset) == place.head else None


def _place_of(info: Any, shape: tuple[int, ...], dtype: torch.dtype) -> _Place | None:
    """Where a stored tensor may lie bare, by the index."""
    if info is None or info.transform_descriptors:
        return None
    archive = tensor_archive(shape, dtype)
    if archive is None or archive.payload == 0 or archive.length != info.length:
        return None
    return _Place(info.relative_path, info.offset, archive.head, archive.payload, shape, dtype)


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
            if _is_plain(target, stored.part):
                pieces += _pieces(stored.file, stored.offset, target)
            else:
                indirect.append((target, stored))
        _read_pieces(pieces, pool)
        pieces, copies = [], []
        for number, (target, stored) in enumerate(indirect):
            whole = torch.empty(stored.place.shape, dtype=stored.place.dtype, device="cpu")
            part = stored.part
            pieces += _pieces(stored.file, stored.place.begin, whole)
            copies.append((target, whole.as_strided(part.size(), part.stride(), part.storage_offset())))
            if sum(piece[3] for piece in pieces) > _AT_ONCE or number == len(indirect) - 1:
                _read_pieces(pieces, pool)
                for into, source in copies:
                    into.copy_(source)
                pieces, copies = [], []


def _is_plain(target: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether a part of what is stored can be read to where it belongs as it is."""
    fits = target.device.type == "cpu" and target.is_contiguous() and part.is_contiguous()
    return fits and target.dtype == part.dtype and not (target.is_conj() or target.is_neg())


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
