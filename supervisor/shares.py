"""The own shares of an attempt's ranks (what they are: ``decide/straggler.py``), as far as they are known here."""

from __future__ import annotations

import math

from supervisor.attempt import Attempt
from supervisor.edge.control import Word


def here(attempt: Attempt) -> dict[int, float]:
    """Of the ranks on this node."""
    shares = {seat.rank: seat.page.double(Word.OWN_SHARE) for seat in attempt.seats.values()}
    return {rank: share for rank, share in shares.items() if not math.isnan(share)}


def everywhere(attempt: Attempt) -> dict[int, float]:
    """… and of the ranks on other nodes, as they have told the leader."""
    return {**(attempt.others.own_shares if attempt.others is not None else {}), **here(attempt)}


def nodes(attempt: Attempt) -> tuple[str, ...]:
    """The names of its nodes, by rank, where this one leads others."""
    return attempt.others.nodes if attempt.others is not None else ()
