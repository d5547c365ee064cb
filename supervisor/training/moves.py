"""Moving tensors into their places, many at a time, and comparing them with what lies there.

A large contiguous tensor is one ``memmove`` (it writes past the cache, and leaves the interpreter to others meanwhile);
thousands of small ones are one ``torch._foreach_copy_``. Neither ever wakes torch's thread pool, so a copy behind the
training takes one core at most, and no setting of the training's is touched. Whatever is neither on the CPU nor
contiguous is left to ``copy_``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.distributed.tensor import DTensor

from supervisor.training.arena import Arena

_BULK: Final = 1 << 15  # elements; torch copies fewer on the thread that asks for it
_SAME_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_libc = ctypes.CDLL(None)
_memcmp = _libc.memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, as the object that holds it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class Source:
    """A tensor to copy from. It stays good as long as ``is_same`` says so.

    ``address`` is the start of its data; when ``flat``, they are the ``bytes`` that follow.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.address = tensor.data_ptr()
        self._shape = tensor.shape
        self._stride = tensor.stride()
        self.bytes = tensor.numel() * tensor.element_size()
        detached = tensor.detach()
        dtype = tensor.dtype
        plain = not (tensor.is_conj() or tensor.is_neg())
        self.flat = on_cpu = tensor.device.type == "cpu" and plain and tensor.is_contiguous()
        self.bulk = False
        self.view: torch.Tensor = detached
        if on_cpu:
            flat = detached.reshape(-1).view(torch.uint8)
            words = (
                self.bytes % 8 == 0
                and self.address % 8 == 0
                and detached.storage_offset() * dtype.itemsize % 8 == 0
            )
            self.view = flat.view(torch.int64) if words else flat
            self.bulk = self.view.numel() >= _BULK
        elif plain and dtype.itemsize in _SAME_SIZE and tensor.dim():
            self.view = detached.view(_SAME_SIZE[dtype.itemsize])  # not every dtype can be copied as itself
        #: of the place: as the view's
        self.shape = tuple(self.view.shape)
        self.dtype = self.view.dtype

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is this one still, where it was and as it was."""
        return (
            tensor.data_ptr() == self.address
            and tensor.stride() == self._stride
            and tensor.shape == self._shape
            and tensor.dtype == self.tensor.dtype
        )


@dataclass
class Moves:
    """What to copy into one arena. Holds on to the tensors it copies from."""

    bulk: list[tuple[int, int, int]] = field(default_factory=list)  # to, from, bytes
    places: list[torch.Tensor] = field(default_factory=list)
    views: list[torch.Tensor] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def add(self, arena: Arena, offset: int, source: Source) -> None:
        """Copy ``source`` to ``offset``."""
        self.sources.append(source)
        if source.bulk:
            self.bulk.append((arena.address + offset, source.address, source.bytes))
        elif source.bytes:
            self.places.append(arena.view(offset, source.shape, source.dtype))
            self.views.append(source.view)

    def run(self) -> None:
        """Copy everything."""
        for move in self.bulk:
            ctypes.memmove(*move)
        if self.places:
            with torch.no_grad():
                torch._foreach_copy_(self.places, self.views)

    def differs(self) -> bool:
        """Whether any source is not what was copied any more."""
        if any(_memcmp(*move) for move in self.bulk):
            return True
        return any(not torch.equal(old, new) for old, new in zip(self.places, self.views, strict=True))
