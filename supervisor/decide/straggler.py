"""Which rank the others wait for, from how each spends the time of its steps.

Ranks that march in step take equally long for a step, whichever is slow. What differs is how much of it a rank spends waiting for
the others: the slow one least. A rank's *own share* is the part of the last minute in which its main thread was not at a
place where one waits for other ranks (``decide/stacks.py``; looked at some four times a second, so it is good to a few percent).

What it can tell: slow data, a slow CPU, Python code that only one rank runs. What it cannot: a slow GPU. There the main
threads of all ranks wait for their own device (``.item()``, a full queue), on which the wait for the others is not told
from work.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Final

APART: Final = 0.2  # of the time: less is noise, or not worth a name


def slowest(own_shares: Mapping[int, float]) -> int | None:
    """The rank that has clearly more to do than the others; None when there is none."""
    if len(own_shares) < 2:
        return None
    rank = max(own_shares, key=lambda each: own_shares[each])
    return rank if own_shares[rank] - others(own_shares, rank) > APART else None


def percents(shares: Sequence[float | None]) -> tuple[int, ...]:
    """As they are told to others: small numbers; -1: not known."""
    return tuple(-1 if share is None else round(100 * share) for share in shares)


def from_percents(percents: Sequence[int], first: int = 0) -> dict[int, float]:
    """Own shares by rank, of the ranks from ``first`` on."""
    return {first + i: percent / 100 for i, percent in enumerate(percents) if percent >= 0}


def node_of(rank: int, world_size: int | None, nodes: Sequence[str]) -> str | None:
    """The name of the node that has this rank, as every one of ``nodes`` has equally many; None on a single one."""
    each = (world_size or 0) // len(nodes) if nodes else 0
    return nodes[rank // each] if each and 0 <= rank < each * len(nodes) else None


def others(own_shares: Mapping[int, float], rank: int) -> float:
    """The own share that the ranks but ``rank`` usually have."""
    return statistics.median(share for other, share in own_shares.items() if other != rank)
