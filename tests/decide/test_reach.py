"""Who is left out when nodes do not reach each other."""

from __future__ import annotations

import itertools

import pytest

from supervisor.decide import reach

NODES = ("h1", "h2", "h3", "h4")


def test_a_pair_is_one_whoever_of_the_two_has_told() -> None:
    for told in ({"h2": ["h3"]}, {"h3": ["h2"]}, {"h2": ["h3"], "h3": ["h2"]}):
        assert reach.pairs_of(told, NODES) == (("h2", "h3"),)
    assert reach.pairs_of({"h2": ["gone"], "gone": ["h3"], "h1": ["h1"]}, NODES) == ()


@pytest.mark.parametrize(
    ("pairs", "out"),
    [
        ((), ()),
        ((("h2", "h3"),), ("h3",)),
        ((("h1", "h3"),), ("h3",)),  # h1 leads
        ((("h1", "h2"),), ("h2",)),
        ((("h2", "h3"), ("h2", "h4")), ("h2",)),  # one host is cut off from all but the store
        ((("h1", "h2"), ("h2", "h3"), ("h2", "h4")), ("h2",)),
        ((("h1", "h2"), ("h3", "h4")), ("h4", "h2")),
    ],
)
def test_the_fewest_are_left_out_and_never_the_leader(
    pairs: tuple[reach.Pair, ...], out: tuple[str, ...]
) -> None:
    assert reach.left_out(pairs, NODES, "h1") == out


def test_whoever_stays_reaches_all_others() -> None:
    possible = list(itertools.combinations(NODES, 2))
    for count in range(1, len(possible) + 1):
        for pairs in itertools.combinations(possible, count):
            staying = set(NODES) - set(reach.left_out(pairs, NODES, "h2"))
            assert "h2" in staying
            assert not any(set(pair) <= staying for pair in pairs)


def test_the_pair_is_named() -> None:
    assert reach.described([("h2", "h3")]) == "h2 and h3 do not reach each other"
    assert "1 more pair of nodes" in reach.described([("h2", "h3"), ("h2", "h4")])
    assert "2 more pairs of nodes" in reach.described([("h2", "h3"), ("h2", "h4"), ("h3", "h4")])


def test_of_very_many_nodes_each_tries_its_neighbours_and_every_pair_of_those_is_tried() -> None:
    assert sorted(reach.asked(1, 4, 64)) == [0, 2, 3]
    assert reach.asked(0, 1, 64) == []
    tried = {frozenset((rank, other)) for rank in range(500) for other in reach.asked(rank, 500, 64)}
    assert all(frozenset((rank, (rank + d) % 500)) in tried for rank in range(500) for d in range(1, 65))
