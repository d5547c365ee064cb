"""How a file is cut, and how few ranges cover what is wanted of it."""

from __future__ import annotations

import itertools
import random

import pytest

from supervisor.checkpoint.pieces import SMALLEST, Range, cut, merged, piece_size, without

SIZES = [0, 1, SMALLEST - 1, SMALLEST, SMALLEST + 1, 3 * SMALLEST, 256 * SMALLEST, 256 * SMALLEST + 1, 10**12]


@pytest.mark.parametrize("size", SIZES)
def test_pieces_follow_each_other_from_the_begin_to_the_end(size: int) -> None:
    pieces = list(cut(size))
    assert 1 <= len(pieces) <= 256
    assert piece_size(size) % SMALLEST == 0
    at = 0
    for start, length in pieces:
        assert start == at
        at += length
    assert at == size
    assert all(length == piece_size(size) for _, length in pieces[:-1])


@pytest.mark.parametrize("seed", range(20))
def test_merged_ranges_cover_what_is_wanted_and_no_square_more(seed: int) -> None:
    generator = random.Random(seed)
    size, grid = generator.randrange(1, 1000), generator.choice([1, 7, 32])
    wanted = some(generator, size)
    found = merged(wanted, size, grid)
    squares = {byte // grid for byte in covered(wanted)}
    assert covered(found) == [byte for byte in range(size) if byte // grid in squares]
    assert all(sum(one) < other[0] for one, other in itertools.pairwise(found)), "few"


@pytest.mark.parametrize("seed", range(20))
def test_what_is_there_is_not_asked_for_again(seed: int) -> None:
    generator = random.Random(seed)
    size = generator.randrange(1, 1000)
    wanted, there = merged(some(generator, size), size, 1), merged(some(generator, size), size, 1)
    missing = without(wanted, there)
    assert set(covered(missing)) == set(covered(wanted)) - set(covered(there))
    assert len(covered(missing)) == len(set(covered(missing)))


def some(generator: random.Random, size: int) -> list[Range]:
    starts = [generator.randrange(size) for _ in range(generator.randrange(8))]
    return [(start, generator.randrange(size - start + 1)) for start in starts]


def covered(ranges: list[Range]) -> list[int]:
    return [byte for start, length in ranges for byte in range(start, start + length)]
