"""Two checkpoints, item by item: what is new, missing, of another shape, and by how much the rest has changed.

Both are read block by block, so that memory does not grow with the checkpoints, however they are sharded. Norms are summed
in float64 (complex numbers as pairs). Equal means equal bits, so that a NaN equals itself.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from supervisor.errors import CheckpointError
from supervisor.training.contents.opened import Contents, Item, UnsafeError

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kind(enum.StrEnum):
    """What became of an item."""

    SAME = "same"
    CHANGED = "changed"
    NEW = "new"
    MISSING = "missing"
    RESHAPED = "reshaped"
    RETYPED = "retyped"  # of another dtype, or no tensor any more


@dataclass(frozen=True, kw_only=True)
class Change:
    """One item of either checkpoint. Numbers are None where they make no sense; not finite where the tensors are not."""

    key: str
    kind: Kind
    a: Item | None
    b: Item | None
    norm_a: float | None = None  # Euclidean
    norm_b: float | None = None
    difference: float | None = None  # norm of B - A
    relative: float | None = None  # that / norm of A; None if only the latter is 0
    largest: float | None = None  # of the absolute differences
    elements: int | None = None  # how many differ
    value_a: str | None = None  # of an object, where it is short
    value_b: str | None = None


def compare(a: Contents, b: Contents, items_a: list[Item], items_b: list[Item]) -> Iterator[Change]:
    """Every item of both, in the order of their keys; A's first. Raises CheckpointError, StorageError.

    One thread does it: on a busy machine several wait for each other at every block, and take ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _compare(a, b, items_a, items_b)
    finally:
        torch.set_num_threads(threads)


def _compare(a: Contents, b: Contents, items_a: list[Item], items_b: list[Item]) -> Iterator[Change]:
    left, right = {item.key: item for item in items_a}, {item.key: item for item in items_b}
    for key in [*left, *(key for key in right if key not in left)]:
        one, other = left.get(key), right.get(key)
        if one is None:
            assert other is not None
            yield Change(key=key, kind=Kind.NEW, a=None, b=other, norm_b=_norm(b, other))
        elif other is None:
            yield Change(key=key, kind=Kind.MISSING, a=one, b=None, norm_a=_norm(a, one))
        elif one.is_tensor != other.is_tensor:
            yield Change(
                key=key, kind=Kind.RETYPED, a=one, b=other, norm_a=_norm(a, one), norm_b=_norm(b, other)
            )
        elif not one.is_tensor:
            yield _objects(a, b, one, other)
        elif one.shape != other.shape:
            yield Change(
                key=key, kind=Kind.RESHAPED, a=one, b=other, norm_a=_norm(a, one), norm_b=_norm(b, other)
            )
        else:
            yield _tensors(a, b, one, other)


class _Sums:
    """What is added up over the blocks of a pair of tensors."""

    def __init__(self) -> None:
        self.a = self.b = self.difference = self.largest = 0.0
        self.elements = 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Flat blocks of the same elements."""
        different: int | None = None
        if a.dtype == b.dtype:
            words_a, words_b = _words(a), _words(b)
            if torch.equal(words_a, words_b):
                square = _square(_wide(a))
                self.a += square
                self.b += square
                return
            unequal = words_a != words_b
            different = int(torch.count_nonzero(unequal if unequal.dim() == 1 else unequal.any(1)))
        elif a.is_complex() != b.is_complex():
            a, b = a.to(torch.complex128), b.to(torch.complex128)
        wide_a, wide_b = _wide(a), _wide(b)
        if different is None:  # of another dtype: equal if the values are
            different = int((wide_a != wide_b).view(len(a), -1).any(1).sum())
        self.elements += different
        self.a += _square(wide_a)
        self.b += _square(wide_b)
        difference = wide_b.sub_(wide_a).reshape(-1)
        self.difference += _square(difference)
        largest = float(torch.linalg.vector_norm(difference, math.inf))
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)


def _tensors(a: Contents, b: Contents, one: Item, other: Item) -> Change:
    sums = _Sums()
    for left, right in zip(a.blocks(one), b.blocks(other), strict=True):
        sums.add(left, right)
    kind = Kind.RETYPED if one.dtype != other.dtype else Kind.CHANGED if sums.elements else Kind.SAME
    relative: float | None = math.sqrt(sums.difference / sums.a) if sums.a else None
    if not sums.difference:
        relative = 0.0
    return Change(
        key=one.key,
        kind=kind,
        a=one,
        b=other,
        norm_a=math.sqrt(sums.a),
        norm_b=math.sqrt(sums.b),
        difference=math.sqrt(sums.difference),
        relative=relative,
        largest=sums.largest,
        elements=sums.elements,
    )


def _objects(a: Contents, b: Contents, one: Item, other: Item) -> Change:
    same = a.stored(one) == b.stored(other)
    value_a, value_b = _text(a, one), _text(b, other)
    if not same and value_a is not None and value_b is not None:  # the same value may be written in two ways
        same = value_a == value_b
    short = all(value is None or len(value) <= 40 for value in (value_a, value_b))
    return Change(
        key=one.key,
        kind=Kind.SAME if same else Kind.CHANGED,
        a=one,
        b=other,
        value_a=value_a if short else None,
        value_b=value_b if short else None,
    )


def _text(contents: Contents, item: Item) -> str | None:
    """An object in words; None for one that cannot be read safely."""
    try:
        return repr(contents.object(item))
    except UnsafeError:
        return None


def _norm(contents: Contents, item: Item) -> float | None:
    if not item.is_tensor:
        return None
    return math.sqrt(sum(_square(_wide(block)) for block in contents.blocks(item)))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bits as integers, (elements,) or (elements, integers of each): a NaN equals itself."""
    if tensor.dtype.itemsize in _INTEGERS:
        return tensor.view(_INTEGERS[tensor.dtype.itemsize])
    return tensor.view(torch.uint8).view(len(tensor), -1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, complex numbers as pairs."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128))
    try:
        return tensor.to(torch.float64, copy=True)
    except (RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"tensors of {tensor.dtype} cannot be compared: {error}") from None


def _square(tensor: torch.Tensor) -> float:
    flat = tensor.reshape(-1)
    return float(torch.dot(flat, flat))
