"""Which nodes are part of an attempt, and when that changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import membership
from supervisor.decide.membership import Present, Size, Suspicions, blame, choose, may_start, should_grow
from supervisor.fleet import Member

TWO_TO_FOUR = Size(least=2, most=4)


def present(*names: str, since: float = 0.0) -> list[Present]:
    return [Present(member=Member(name=name, life="1"), since=since) for name in names]


def names(members: tuple[Member, ...] | None) -> str:
    assert members is not None
    return "".join(member.name for member in members)


def test_the_first_attempt_goes_by_the_ranks_that_users_asked_for_then_by_name() -> None:
    asked = [
        Present(member=Member(name=name, life="1"), rank=rank)
        for name, rank in (("b", None), ("c", 0), ("a", 1))
    ]
    assert names(choose(asked, TWO_TO_FOUR)) == "cab"


@pytest.mark.parametrize(
    ("there", "previous", "expected"),
    [
        ("abc", "abc", "abc"),
        ("cba", "bca", "bca"),
        ("acd", "abc", "adc"),  # a spare takes the place of who is gone
        ("ac", "abc", "ac"),
        ("bc", "abc", "cb"),  # c moves up, b keeps its rank
        ("abcd", "ab", "abcd"),
        ("abcdef", "ab", "abcd"),
        ("cd", "ab", "cd"),
    ],
)
def test_who_stays_keeps_its_rank(there: str, previous: str, expected: str) -> None:
    assert names(choose(present(*there), TWO_TO_FOUR, previous=list(previous))) == expected


def test_fewer_than_the_least_is_no_attempt() -> None:
    assert choose(present("a"), TWO_TO_FOUR) is None


def test_an_excluded_node_is_left_out_unless_it_is_needed() -> None:
    assert names(choose(present("a", "b", "c"), TWO_TO_FOUR, excluded=frozenset("a"))) == "bc"
    assert names(choose(present("a", "b"), TWO_TO_FOUR, excluded=frozenset("a"))) == "ab"


@given(
    there=st.sets(st.sampled_from("abcdefgh")),
    previous=st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=6),
    excluded=st.frozensets(st.sampled_from("abcdefgh")),
    bounds=st.tuples(st.integers(1, 4), st.integers(0, 4)),
)
def test_whatever_there_is(
    there: set[str], previous: Sequence[str], excluded: frozenset[str], bounds: tuple[int, int]
) -> None:
    size = Size(least=bounds[0], most=bounds[0] + bounds[1])
    members = choose(present(*sorted(there)), size, previous=previous, excluded=excluded)
    if len(there) < size.least:
        assert members is None
        return
    assert members is not None
    chosen = [member.name for member in members]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= there
    assert size.least <= len(chosen) <= size.most
    fit = there - excluded
    if len(fit) >= size.least:
        assert not set(chosen) & excluded
        assert len(chosen) == min(len(fit), size.most)
    for rank, name in enumerate(previous[: len(chosen)]):
        if name in chosen and (len(fit) >= size.least):
            assert chosen[rank] == name


def test_the_first_attempt_waits_a_little_for_all() -> None:
    excluded: frozenset[str] = frozenset()
    assert may_start(present("a", "b", "c", "d"), TWO_TO_FOUR, excluded, 0.0)
    assert not may_start(present("a"), TWO_TO_FOUR, excluded, 1e9)
    assert not may_start(present("a", "b"), TWO_TO_FOUR, excluded, membership.GATHERING - 1)
    assert may_start(present("a", "b"), TWO_TO_FOUR, excluded, membership.GATHERING)
    late = [*present("a"), *present("b", since=100.0)]
    assert not may_start(late, TWO_TO_FOUR, excluded, 101.0), "it may be the first of several"


def test_growing_back() -> None:
    members = [Member(name=name, life="1") for name in "ab"]

    def grows(there: list[Present], running: float = 1e6, now: float = 1e6, bad: str = "") -> bool:
        return should_grow(there, members, TWO_TO_FOUR, excluded=frozenset(bad), running=running, now=now)

    assert grows(present("a", "b", "c"))
    assert not grows(present("a", "b"))
    assert not grows(present("a", "b", "c"), running=1.0), "an attempt is let run for a while"
    assert not grows(present("a", "b", "c", since=1e6 - 1)), "it has only just come"
    assert not grows(present("a", "b", "c"), bad="c")
    full = [Member(name=name, life="1") for name in "abcd"]
    assert not should_grow(present(*"abcde"), full, TWO_TO_FOUR, excluded=frozenset(), running=1e6, now=1e6)


def test_a_node_that_fails_first_again_and_again_is_left_out_for_longer_and_longer() -> None:
    suspicions = blame(Suspicions(), "a", progressed=True, now=0.0)
    assert not suspicions.excluded_at(0.0)
    suspicions = blame(suspicions, "a", progressed=False, now=1.0)
    assert suspicions.excluded_at(1.0) == {"a"}
    assert "2 times" in suspicions.excluded["a"].reason
    assert suspicions.excluded_at(membership.FIRST_EXCLUSION) == {"a"}
    assert not suspicions.excluded_at(membership.FIRST_EXCLUSION + 2)
    for now in (2000.0, 2001.0):
        suspicions = blame(suspicions, "a", progressed=False, now=now)
    assert suspicions.excluded_at(2001.0 + 1.9 * membership.FIRST_EXCLUSION) == {"a"}


def test_progress_or_another_node_in_between_clears_it() -> None:
    for between in (("a", True), ("b", False), (None, False)):
        suspicions = blame(Suspicions(), "a", progressed=False, now=0.0)
        suspicions = blame(suspicions, between[0], progressed=between[1], now=1.0)
        if between[0] != "a":
            suspicions = blame(suspicions, "a", progressed=False, now=2.0)
        assert not suspicions.excluded_at(2.0), between


def test_a_node_that_others_do_not_reach_is_left_out_at_once_and_for_longer_each_time() -> None:
    once = membership.exclude(Suspicions(), "c", "b and c do not reach each other", 100.0, apart=True)
    assert once.excluded_at(100.0 + membership.FIRST_EXCLUSION - 1) == once.apart_at(101.0) == {"c"}
    assert not once.apart_at(100.0 + membership.FIRST_EXCLUSION)
    twice = membership.exclude(once, "c", "again", 1000.0, apart=True)
    assert twice.excluded["c"].seconds == 2 * membership.FIRST_EXCLUSION
    crashed = membership.exclude(once, "a", "it failed first", 100.0)
    assert crashed.excluded_at(101.0) == {"a", "c"}
    assert crashed.apart_at(101.0) == {"c"}, "what is in the memory of the other one can be had"


@pytest.mark.parametrize(
    ("leaving", "here", "others_lead", "expected"),
    [
        ("c", "abc", False, True),
        ("c", "abcd", False, True),
        ("bc", "abc", False, False),  # too few
        ("bc", "abcd", False, True),  # a spare is there
        ("a", "abc", True, True),
        ("a", "abc", False, False),  # nobody else can lead
        ("ab", "abc", True, False),
        ("d", "abc", False, True),  # who has gone already
    ],
)
def test_going_on_without_nodes_that_must_leave(
    leaving: str, here: str, others_lead: bool, expected: bool
) -> None:
    assert expected is membership.goes_on_without(
        leaving, here=here, size=TWO_TO_FOUR, leader="a", others_lead=others_lead
    )
