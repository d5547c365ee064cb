"""Who is part of the next attempt: which nodes, in which order, and when it is time for a change.

*Keep places.* A node that stays keeps its rank, because the files in its RAM are those of that rank. Who is new takes the place of who
is gone. Only where fewer are left do all move up.

*MIN:MAX.* An attempt begins with as many as there are, up to MAX; with fewer than MIN it waits. At the start it waits for MAX, too,
but not for long: late nodes join at the next good moment. That is a save which all ranks have agreed on, so that nobody loses a
step by it; and not before the attempt has held a while, so that a node that comes and goes does not make all others come and go.

*Bad nodes.* The node of the rank that failed first is *suspected*; what follows on others is a consequence. Twice in a row, with nothing
committed in between, and it is excluded: for a while that doubles each time, and only as long as MIN is met without it. Software that
fails everywhere seldom chooses the same node twice, and is not helped by this; the budget of failures ends it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from supervisor.fleet import Member

GATHERING: Final = 10.0  # seconds that the first attempt waits for MAX nodes once there are MIN
SETTLED: Final = 30.0  # seconds that an attempt is left alone before it is stopped to take in more nodes
SUSPICIONS: Final = 2  # in a row
FIRST_EXCLUSION: Final = 600.0  # seconds, doubling
LONGEST_EXCLUSION: Final = 86400.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many nodes an attempt may have."""

    least: int
    most: int

    def __str__(self) -> str:
        """As it is given."""
        return str(self.least) if self.least == self.most else f"{self.least}:{self.most}"


@dataclass(frozen=True, kw_only=True)
class Present:
    """A node that could be part of an attempt. ``rank``: what its user asked for."""

    member: Member
    rank: int | None = None
    since: float = 0.0  # when it was first seen, on the leader's monotonic clock


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """A node that is left out until ``until`` (Unix seconds)."""

    until: float
    seconds: float
    reason: str
    apart: bool = False  # some of the others do not reach it


@dataclass(frozen=True, kw_only=True)
class Suspicions:
    """What is held against nodes."""

    node: str | None = None  # the one that failed first, the last time
    count: int = 0  # times in a row
    excluded: Mapping[str, Exclusion] = field(default_factory=dict)

    def excluded_at(self, now: float) -> frozenset[str]:
        """Who is left out."""
        return frozenset(name for name, one in self.excluded.items() if one.until > now)

    def apart_at(self, now: float) -> frozenset[str]:
        """… because others do not reach them."""
        return frozenset(name for name in self.excluded_at(now) if self.excluded[name].apart)


def blame(suspicions: Suspicions, node: str | None, *, progressed: bool, now: float) -> Suspicions:
    """An attempt failed, first on ``node`` (None: nobody knows). ``progressed``: something was committed since the last failure."""
    count = 1 if progressed or node != suspicions.node else suspicions.count + 1
    suspicions = replace(suspicions, node=node, count=count if node is not None else 0)
    if node is None or count < SUSPICIONS:
        return suspicions
    reason = f"it failed first {count} times in a row without progress"
    return exclude(replace(suspicions, node=None, count=0), node, reason, now)


def exclude(suspicions: Suspicions, node: str, reason: str, now: float, *, apart: bool = False) -> Suspicions:
    """Leave a node out: for twice as long as the last time."""
    before = suspicions.excluded.get(node)
    seconds = min(LONGEST_EXCLUSION, before.seconds * 2 if before is not None else FIRST_EXCLUSION)
    exclusion = Exclusion(until=now + seconds, seconds=seconds, reason=reason, apart=apart)
    return replace(suspicions, excluded={**suspicions.excluded, node: exclusion})


def choose(
    present: Iterable[Present],
    size: Size,
    *,
    previous: Sequence[str] = (),
    excluded: frozenset[str] = frozenset(),
) -> tuple[Member, ...] | None:
    """The nodes of the next attempt by rank; None while there are too few. ``previous``: names of the last attempt's, by rank."""
    there = {one.member.name: one for one in present}
    fit = {name: one for name, one in there.items() if name not in excluded}
    if len(fit) < size.least:  # rather a bad node than none
        fit = there
    if len(fit) < size.least:
        return None
    count = min(len(fit), size.most)
    waiting = sorted((name for name in fit if name not in previous), key=lambda name: _order(fit[name]))
    places: list[str | None] = [name if name in fit else None for name in previous[:count]]
    surplus = [name for name in previous[count:] if name in fit]
    places += [None] * (count - len(places))
    if not previous:  # the first: by what their users asked for
        places = list(waiting[:count])
    else:
        queue = iter([*surplus, *waiting])
        places = [name if name is not None else next(queue) for name in places]
    return tuple(fit[name].member for name in places if name is not None)


def may_start(
    present: Iterable[Present],
    size: Size,
    excluded: frozenset[str],
    now: float,
    gathering: float = GATHERING,
) -> bool:
    """Whether the first attempt need not wait for more nodes: ``gathering`` seconds from when there were MIN."""
    since = sorted(one.since for one in present if one.member.name not in excluded)
    if len(since) >= size.most:
        return True
    return len(since) >= size.least and now - since[size.least - 1] >= gathering


def should_grow(
    present: Iterable[Present],
    members: Sequence[Member],
    size: Size,
    *,
    excluded: frozenset[str],
    running: float,
    now: float,
) -> bool:
    """Whether it is worth stopping an attempt of ``members``, which has made steps for ``running`` seconds, to take in more."""
    if len(members) >= size.most or running < SETTLED:
        return False
    names = {member.name for member in members}
    steady = [one for one in present if now - one.since >= SETTLED / 3]
    return any(one.member.name not in names and one.member.name not in excluded for one in steady)


def goes_on_without(
    names: Collection[str], *, here: Collection[str], size: Size, leader: str, others_lead: bool
) -> bool:
    """Whether the job goes on when the nodes ``names`` must leave, of all that are ``here``. ``others_lead``: another than the leader could."""
    if leader in names and not others_lead:
        return False
    return len(set(here) - set(names)) >= size.least


def _order(one: Present) -> tuple[int, str]:
    return (one.rank if one.rank is not None else 1 << 30, one.member.name)
