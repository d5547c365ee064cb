"""The rank that the others wait for."""

from __future__ import annotations

import pytest

from supervisor.decide.straggler import others, slowest


@pytest.mark.parametrize(
    ("shares", "rank"),
    [
        ({}, None),
        ({0: 0.9}, None),
        ({0: 0.3, 1: 0.9}, 1),
        ({0: 0.8, 1: 0.9}, None),
        ({0: 0.9, 1: 0.2, 2: 0.3, 3: 0.25}, 0),
        ({0: 0.9, 1: 0.9, 2: 0.1, 3: 0.1}, 0),
        ({0: 0.9, 1: 0.9, 2: 0.9, 3: 0.1}, None),  # three march in step, and one is fast
    ],
)
def test_slowest(shares: dict[int, float], rank: int | None) -> None:
    assert slowest(shares) == rank


def test_others() -> None:
    assert others({0: 0.9, 1: 0.2, 2: 0.3, 3: 0.25}, 0) == 0.25
