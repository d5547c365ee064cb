"""Nodes that do not reach each other, though all of them reach the store: which pairs, and who is left out of the next attempt.

Ranks connect to each other before their first step, and wait for minutes where a network loses what they send. A supervisor that waits, too,
learns nothing. So the nodes of an attempt that does not come to its first step, or whose ranks hang, try to connect to one another. Only silence
counts: a host that refuses a connection was reached.

*Who is left out.* The node that is part of most pairs, for the others reach each other without it; of two alike the one of the higher
rank, never the one that leads. What is not told is no proof: a node that was not asked, or has not answered, is not in a pair by that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

Pair = tuple[str, str]


def pairs_of(unreached: Mapping[str, Collection[str]], members: Sequence[str]) -> tuple[Pair, ...]:
    """The pairs of ``members``, by rank, of which one has not reached the other. ``unreached``: by who has tried."""
    rank = {name: number for number, name in enumerate(members)}
    found = {
        (one, other) if rank[one] < rank[other] else (other, one)
        for one, others in unreached.items()
        for other in others
        if one in rank and other in rank and one != other
    }
    return tuple(sorted(found, key=lambda pair: (rank[pair[0]], rank[pair[1]])))


def odd_one_out(pairs: Sequence[Pair], members: Sequence[str], leader: str) -> str | None:
    """Who is left out, so that fewer such pairs remain; None where there is none."""
    counts = Counter(name for pair in pairs for name in pair if name != leader)
    if not counts:
        return None
    rank = {name: number for number, name in enumerate(members)}
    return max(counts, key=lambda name: (counts[name], rank[name]))


def left_out(pairs: Sequence[Pair], members: Sequence[str], leader: str) -> tuple[str, ...]:
    """All who are left out one after the other, until those that stay reach each other."""
    found: list[str] = []
    while (name := odd_one_out(pairs, members, leader)) is not None:
        found.append(name)
        pairs = [pair for pair in pairs if name not in pair]
    return tuple(found)


def described(pairs: Sequence[Pair]) -> str:
    """In words, for people."""
    first = f"{pairs[0][0]} and {pairs[0][1]} do not reach each other"
    more = len(pairs) - 1
    return first if not more else f"{first}, nor do {more} more pair{'s' if more > 1 else ''} of nodes"


def asked(rank: int, nodes: int, most: int) -> list[int]:
    """The ranks that a node tries to reach: all others, or of very many the next ones, so that each pair of neighbours is tried."""
    return [(rank + distance) % nodes for distance in range(1, min(nodes, most + 1))]
