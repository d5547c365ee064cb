"""The rank that the others wait for."""

from __future__ import annotations

import pytest

from supervisor.decide.straggler import from_percents, node_of, others, percents, slowest


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


def test_shares_are_told_as_small_numbers() -> None:
    assert percents([0.904, None, 0.0]) == (90, -1, 0)
    assert from_percents((90, -1, 0), 4) == {4: 0.9, 6: 0.0}


def test_ranks_are_on_nodes_in_their_order() -> None:
    assert [node_of(rank, 4, ("h1", "h2")) for rank in (-1, 0, 1, 2, 3, 4)] == [
        None,
        "h1",
        "h1",
        "h2",
        "h2",
        None,
    ]
    assert node_of(0, 4, ()) is None
    assert node_of(0, None, ("h1", "h2")) is None
