"""Moving tensors into their places, many at a time, and comparing them with what lies there.

Four ways, none of which wakes torch's thread pool, so a copy behind the training takes one core at most, and no setting
of the training's is touched:

- A *large* contiguous tensor is one ``memmove``: it writes past the cache.
- *Small* ones, of which there may be thousands, are gathered by the kernel. What lies between two neighbours in the file
  never changes, so a row of them is one ``pwritev`` of data and what is between, and all addresses are in an array made
  once: no Python, and no interpreter lock, for each tensor. That is 0.3 µs a tensor, where ``torch._foreach_copy_`` takes 1.8.
- What is on a GPU is queued there (``gpu``): it is copied when the stream gets to it.
- Whatever else is not on the CPU, or not contiguous, is left to ``torch._foreach_copy_``.
"""

from __future__ import annotations

import ctypes
import operator
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from supervisor.training import gpu
from supervisor.training.arena import Arena

SMALL: Final = 1 << 16  # bytes; whatever is shorter
_VECTORS: Final = 1024  # that Linux takes at once
_SAME_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_version: Final = operator.attrgetter("_version")
_libc = ctypes.CDLL(None)
_memcmp = _libc.memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_pwritev = _libc.pwritev
_pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_pwritev.restype = ctypes.c_ssize_t


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each tensor was written in place."""
    return list(map(_version, tensors))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, as the object that holds it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def counters_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What counts how often it is written: of a DTensor, itself does, and its part what is written to that (``to_local``).

    A view of a tensor counts with it; one of a DTensor does, and its part does not.
    """
    return (tensor, tensor._local_tensor) if isinstance(tensor, DTensor) else (tensor,)


class Source:
    """A tensor to copy from. It stays good as long as ``is_same`` says so.

    ``tensor`` is this rank's part of ``whole``, of which the training has ``holder``, if that is not the same object.
    ``address`` is the start of its data; when ``flat``, they are the ``bytes`` that follow. A *weight* is what a module computes
    with, not what an optimizer keeps beside it.
    """

    def __init__(self, whole: torch.Tensor, holder: torch.Tensor | None = None) -> None:
        self.tensor = tensor = local_of(whole)
        self.address = tensor.data_ptr()
        self._shape = tensor.shape
        self._stride = tensor.stride()
        self.bytes = tensor.numel() * tensor.element_size()
        self._is_held = holder is not None and self.is_same(local_of(holder))
        self.counters = counters_of(holder if holder is not None and self._is_held else whole)
        self.is_weight = isinstance(self.counters[0], nn.Parameter)
        plain = not (tensor.is_conj() or tensor.is_neg())
        self.queued = gpu.is_queued(tensor)
        self.flat = tensor.device.type == "cpu" and plain and tensor.is_contiguous() and not self.queued
        #: what to copy as, for what is not flat
        self.view = tensor.detach()
        if plain and tensor.dtype.itemsize in _SAME_SIZE:
            self.view = self.view.view(
                _SAME_SIZE[tensor.dtype.itemsize]
            )  # not every dtype can be copied as itself

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is this one still, where it was and as it was."""
        return (
            tensor.data_ptr() == self.address
            and tensor.stride() == self._stride
            and tensor.shape == self._shape
            and tensor.dtype == self.tensor.dtype
        )

    def is_held_by(self, holder: torch.Tensor | None) -> bool:
        """Whether what counted writes to what it holds still does, as far as that is told."""
        if holder is None or not self._is_held:
            return True
        return all(map(operator.is_, counters_of(holder), self.counters))


@dataclass(frozen=True)
class Spot:
    """Where a tensor's data go: to ``offset``; and what follows up to the data that come next, if that never changes."""

    offset: int
    then: bytes | None


@dataclass(frozen=True)
class _Row:
    """One ``pwritev``: ``count`` vectors from ``address`` on, ``bytes`` in all, to ``offset``."""

    fd: int
    address: int
    count: int
    offset: int
    bytes: int


@dataclass
class Numbers:
    """Places in a list: those of weights, and those of all else."""

    weights: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)

    def add(self, source: Source) -> None:
        """The next one is of ``source``."""
        number = len(self.weights) + len(self.others)
        (self.weights if source.is_weight else self.others).append(number)


@dataclass
class Moves:
    """What to copy into arenas, to be given in the order of the files. Holds on to the tensors it copies from."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    counters: list[torch.Tensor] = field(default_factory=list)  # of their versions
    flat: list[tuple[int, int, int]] = field(default_factory=list)  # to, from, bytes; of those on the CPU
    flat_numbers: Numbers = field(default_factory=Numbers)
    queued_numbers: Numbers = field(default_factory=Numbers)
    _arenas: set[Arena] = field(
        default_factory=set
    )  # which stay mapped as long as there are addresses in them
    _large: list[tuple[int, int, int]] = field(default_factory=list)
    _small: list[tuple[Arena, Spot, Source]] = field(default_factory=list)
    _rows: list[_Row] | None = None
    _vectors: array[int] = field(default_factory=lambda: array("Q"))
    _places: list[torch.Tensor] = field(default_factory=list)
    _views: list[torch.Tensor] = field(default_factory=list)
    devices: set[torch.device] = field(default_factory=set)  # that copies are queued on
    _queued_places: list[torch.Tensor] = field(default_factory=list)
    _queued_views: list[torch.Tensor] = field(default_factory=list)
    _kept: list[object] = field(default_factory=list)

    def add(self, arena: Arena, spot: Spot, source: Source) -> None:
        """Copy ``source`` to its spot."""
        self.tensors.append(source.tensor)
        self.counters += source.counters
        self._kept.append(source.view)  # the memory, wherever the tensor goes
        self._arenas.add(arena)
        if not source.bytes:
            return
        if not source.flat:
            place = arena.view(spot.offset, tuple(source.view.shape), source.view.dtype)
            if source.queued:
                self.devices.add(source.view.device)
                self.queued_numbers.add(source)
            (self._queued_places if source.queued else self._places).append(place)
            (self._queued_views if source.queued else self._views).append(source.view)
            return
        move = arena.address + spot.offset, source.address, source.bytes
        self.flat.append(move)
        self.flat_numbers.add(source)
        if source.bytes < SMALL:
            self._small.append((arena, spot, source))
        else:
            self._large.append(move)

    def run(self) -> None:
        """Copy everything."""
        self.start()
        gpu.wait(gpu.mark(self.devices))

    def start(self) -> None:
        """Copy everything that is not on a GPU, and queue that on its current stream."""
        if self._queued_places:
            gpu.copy(self._queued_places, self._queued_views)
        for move in self._large:
            ctypes.memmove(*move)
        if self._rows is None:
            self._rows = self._lay_rows()
        for row in self._rows:
            if _pwritev(row.fd, row.address, row.count, row.offset) != row.bytes:
                self._move_small()  # the kernel would not; the pages are there
                break
        if self._places:
            with torch.no_grad():
                torch._foreach_copy_(self._places, self._views)

    def _move_small(self) -> None:
        for move in self.flat:
            if move[2] < SMALL:
                ctypes.memmove(*move)

    def _lay_rows(self) -> list[_Row]:
        """The vectors of all small tensors; those that follow each other in the file, in one row."""
        fillings: dict[bytes, ctypes.Array[ctypes.c_char]] = {}
        spans: list[tuple[int, int, int, int, int]] = []  # file, first vector, count, offset, bytes
        before: tuple[Arena, Spot, Source] | None = None
        for arena, spot, source in self._small:
            filling = _between(before, arena, spot)
            before = arena, spot, source
            if filling is not None and spans[-1][2] + 2 <= _VECTORS:
                held = fillings.setdefault(filling, ctypes.create_string_buffer(filling, len(filling)))
                self._vectors.extend((ctypes.addressof(held), len(filling)))
                fd, first, count, offset, size = spans[-1]
                spans[-1] = fd, first, count + 2, offset, size + len(filling) + source.bytes
            else:
                spans.append((arena.fd, len(self._vectors) // 2, 1, spot.offset, source.bytes))
            self._vectors.extend((source.address, source.bytes))
        self._kept += fillings.values()
        base = self._vectors.buffer_info()[0]
        return [_Row(fd, base + 16 * first, count, offset, size) for fd, first, count, offset, size in spans]

    @property
    def queued(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is copied from a GPU: the place, and what goes there, as numbers of the same size."""
        return list(zip(self._queued_places, self._queued_views, strict=True))

    def differs(self) -> bool:
        """Whether any source is not what was copied any more."""
        if not all(are_equal(*move) for move in self.flat):
            return True
        copied = zip(self._places + self._queued_places, self._views + self._queued_views, strict=True)
        return any(not torch.equal(_bytes_of(old), _bytes_of(new)) for old, new in copied)


def are_equal(address: int, other: int, size: int) -> bool:
    """Whether as many bytes are the same in two places of memory."""
    return not _memcmp(address, other, size)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """What would be copied: a NaN is the same as itself."""
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def write_vectors(fd: int, vectors: array[int], offset: int) -> int:
    """One ``pwritev`` of pairs of address and bytes; the bytes written, or -1."""
    return int(_pwritev(fd, vectors.buffer_info()[0], len(vectors) // 2, offset))


def _between(before: tuple[Arena, Spot, Source] | None, arena: Arena, spot: Spot) -> bytes | None:
    """What lies between the data that were copied before and those of ``spot``, if nothing else does."""
    if before is None:
        return None
    known, at, source = before
    joined = known is arena and at.then is not None and at.offset + source.bytes + len(at.then) == spot.offset
    return at.then if joined else None
