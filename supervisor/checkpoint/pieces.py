"""The pieces of a file: what is compared with the manifest by itself, so that a part of a file can be trusted without the rest.

How a file is cut follows from its size alone. A file of more than one piece has the digest of its pieces' digests, so every
byte is hashed once, whether a file is judged as a whole or by what is wanted of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

SMALLEST: Final = 8 << 20  # bytes of a piece
_MOST: Final = 256  # of one file: a manifest is read whole

Range = tuple[int, int]  # where it begins, and its length, in bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the file ``name``; ``blake3`` is the hex of its digest."""

    name: str
    start: int
    length: int
    blake3: str


def piece_size(size: int) -> int:
    """Bytes of each piece but the last of a file of ``size`` bytes."""
    piece = SMALLEST
    while piece * _MOST < size:
        piece *= 2
    return piece


def cut(size: int) -> Iterator[Range]:
    """The pieces of a file of ``size`` bytes; an empty one has one, empty as well."""
    piece = piece_size(size)
    for start in range(0, max(size, 1), piece):
        yield start, min(piece, size - start)


def merged(ranges: Iterable[Range], size: int, grid: int) -> list[Range]:
    """Few ranges, whole squares of the ``grid``, that cover ``ranges`` of a file of ``size`` bytes.

    As every piece is made of such squares, no more pieces have a part in them.
    """
    found: list[Range] = []
    for start, length in sorted(ranges):
        if length <= 0:
            continue
        begin, end = start // grid * grid, min(-(-(start + length) // grid) * grid, size)
        if found and begin <= sum(found[-1]):
            first = found[-1][0]
            found[-1] = first, max(end, sum(found[-1])) - first
        else:
            found.append((begin, end - begin))
    return found


def without(ranges: Iterable[Range], there: Iterable[Range]) -> list[Range]:
    """What of ``ranges`` lies in none of those that are ``there``; both sorted, and each without overlaps."""
    found: list[Range] = []
    known = list(there)
    for start, length in ranges:
        end = start + length
        for begin, size in known:
            if begin >= end:
                break
            if begin + size <= start:
                continue
            if begin > start:
                found.append((start, begin - start))
            start = begin + size
        if start < end:
            found.append((start, end - start))
    return found
