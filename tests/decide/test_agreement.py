"""One save on all nodes: messages late, lost and out of order, leaders that change, nodes cut off at any point."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.decide import agreement as agreements
from supervisor.decide import savepoint
from supervisor.decide.agreement import Agreement, Duty, Posted, Standing, duty
from supervisor.decide.savepoint import Move
from supervisor.fleet import Answer, Proposal
from supervisor.model import ProposalFlag, ProposalState

PLAIN, STOP = ProposalFlag(0), ProposalFlag.STOP
TOGETHER = 3  # steps that ranks can be apart: collectives hold them together


@dataclass
class Rank:
    """As ``training/supervised.py`` has it: publish the step, read the word, wait, save or go on."""

    completed: int = 0
    served: int = 0
    waits: bool = False
    saved: list[int] = field(default_factory=list)
    violated: bool = False

    def end_of_step(self, word: int, step: int) -> None:
        move = savepoint.judge_word(word, step, self.completed, self.served)
        self.waits = move is Move.WAIT
        if move is Move.SAVE:
            self.served = word >> 2
            self.saved.append(self.completed)
        self.violated |= move is Move.VIOLATION


@dataclass
class Node:
    """A node's pages and ranks; what it has seen of the order, and what it has reported."""

    ranks: list[Rank]
    posted: Posted = field(default_factory=Posted)
    word: int = 0
    step: int = 0
    answer: Answer = field(default_factory=Answer)
    reported: Standing = field(default_factory=lambda: Standing(in_session=True))

    def see(self, proposal: Proposal) -> None:
        match duty(self.posted, proposal, 0):
            case Duty.ANSWER:
                self.step = proposal.step
                self._write(proposal.serial, ProposalState.PROPOSED)
                steps = [rank.completed for rank in self.ranks]
                standing = {
                    i for i, rank in enumerate(self.ranks) if rank.waits and rank.completed == proposal.step
                }
                confirmed = savepoint.judge(proposal.step, steps, standing) is ProposalState.COMMITTED
                if not confirmed:
                    self._write(proposal.serial, ProposalState.ABORTED)
                self.answer = Answer(serial=proposal.serial, confirmed=confirmed)
            case Duty.COMMIT:
                self._write(proposal.serial, ProposalState.COMMITTED)
            case Duty.ABORT:
                self._write(proposal.serial, ProposalState.ABORTED)
            case Duty.NOTHING:
                pass

    def _write(self, serial: int, state: ProposalState) -> None:
        self.posted, self.word = Posted(serial=serial, state=state), savepoint.word(serial, state)
        for rank in self.ranks:
            if rank.waits:
                rank.end_of_step(self.word, self.step)

    def report(self) -> None:
        steps = [rank.completed for rank in self.ranks]
        self.reported = Standing(in_session=True, first=min(steps), last=max(steps), answer=self.answer)


class World:
    """The store (an order, the reports), the leader, the nodes. ``play`` does one thing after the other, as it is told."""

    def __init__(self, nodes: int, ranks: int) -> None:
        self.nodes = [Node([Rank() for _ in range(ranks)]) for _ in range(nodes)]
        self.leader = Agreement(attempt=0)
        self.order = Proposal()
        self.views = [Standing(in_session=True)] * nodes  # as the leader has last read them
        self.now = 0.0
        self.cut: set[int] = set()
        self.committed: list[int] = []

    @property
    def ranks(self) -> list[Rank]:
        return [rank for node in self.nodes for rank in node.ranks]

    def step(self, node: int, rank: int) -> None:
        mine = self.nodes[node].ranks[rank]
        slowest = min(other.completed for other in self.ranks)
        if mine.waits or mine.completed - slowest >= TOGETHER:
            return
        mine.completed += 1
        mine.end_of_step(self.nodes[node].word, self.nodes[node].step)

    def lead(self, seconds: float, rate: float | None) -> None:
        self.now += seconds
        self.leader = self._order(agreements.look(self.leader, self.views, rate, self.now), self.leader)

    def _order(self, wanted: Agreement, before: Agreement) -> Agreement:
        if wanted.proposal == before.proposal:
            return wanted
        self.order = wanted.proposal
        if self.order.state is ProposalState.COMMITTED:
            self.committed.append(self.order.step)
        return wanted

    def change_of_leader(self) -> None:
        """The new one knows the order as it is in the store, and nothing else; the old one's writes fail from now on."""
        self.leader = Agreement(attempt=0, proposal=self.order, since=self.now)
        self.leader = agreements.want(self.leader, PLAIN)
        if self.order.state in (ProposalState.PROPOSED, ProposalState.COMMITTED):
            self.leader = replace(self.leader, out=self.order.purpose)

    def check(self) -> None:
        assert not any(rank.violated for rank in self.ranks)
        furthest = max(len(rank.saved) for rank in self.ranks)
        longest = next(rank.saved for rank in self.ranks if len(rank.saved) == furthest)
        for rank in self.ranks:
            assert rank.saved == longest[: len(rank.saved)], "ranks have saved different steps"
            for step in longest[len(rank.saved) :]:
                assert rank.completed <= step, f"a rank has passed {step} without saving it"
        assert longest == self.committed[: len(longest)]


ACTIONS = (
    "step",
    "step",
    "step",
    "see",
    "report",
    "read",
    "lead",
    "want",
    "request",
    "cut",
    "heal",
    "leader",
)


@settings(max_examples=150)
@given(
    nodes=st.integers(1, 4),
    ranks=st.integers(1, 3),
    moves=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 11), st.floats(0, 3)), max_size=250),
    rate=st.none() | st.floats(0, 10),
)
def test_all_ranks_save_the_same_steps_whatever_happens(
    nodes: int, ranks: int, moves: Sequence[tuple[str, int, float]], rate: float | None
) -> None:
    world = World(nodes, ranks)
    for what, which, seconds in moves:
        play(world, what, which % nodes, which % ranks, seconds, rate)
        world.check()
    world.cut.clear()
    world.leader = agreements.want(world.leader, STOP)
    for _ in range(1500):  # everybody is heard again: what is wanted gets done
        for node in range(nodes):
            play(world, "see", node, 0, 0.0, rate)
            for rank in range(ranks):
                play(world, "step", node, rank, 0.0, rate)
            play(world, "report", node, 0, 0.0, rate)
            play(world, "read", node, 0, 0.0, rate)
        play(world, "lead", 0, 0, 0.01, rate)
        world.check()
        served = {len(rank.saved) for rank in world.ranks} == {len(world.committed)}
        if served and world.order.state is ProposalState.COMMITTED and world.order.purpose & STOP:
            return
        if served and world.committed:
            world.leader, _ = agreements.served(world.leader, world.committed[-1])
    raise AssertionError(
        f"a stop was never agreed on: {world.leader} {[node.posted for node in world.nodes]}"
    )


def play(world: World, what: str, node: int, rank: int, seconds: float, rate: float | None) -> None:
    match what:
        case "step":
            world.step(node, rank)
        case "see" if node not in world.cut:
            world.nodes[node].see(world.order)
        case "report" if node not in world.cut:
            world.nodes[node].report()
        case "read":
            world.views[node] = world.nodes[node].reported
        case "lead":
            world.lead(seconds, rate)
        case "want":
            world.leader = agreements.want(world.leader, PLAIN)
        case "request":
            world.leader = agreements.request(world.leader, world.nodes[node].ranks[rank].completed + 1)
        case "cut":
            world.cut.add(node)
        case "heal":
            world.cut.discard(node)
        case "leader":
            world.change_of_leader()
        case _:
            pass


# --------------------------------------------------------------------------- one by one

TWO = (Standing(in_session=True, first=5, last=6), Standing(in_session=True, first=5, last=5))


def answered(serial: int, confirmed: bool, standing: Standing = TWO[0]) -> Standing:
    return replace(standing, answer=Answer(serial=serial, confirmed=confirmed))


def proposed(flags: ProposalFlag = PLAIN) -> Agreement:
    return agreements.look(agreements.want(Agreement(attempt=0), flags), TWO, None, 10.0)


def test_a_step_ahead_of_everybody_is_proposed_once_all_are_in_their_loop() -> None:
    wanted = agreements.want(Agreement(attempt=0), STOP)
    assert agreements.look(wanted, [TWO[0], replace(TWO[1], in_session=False)], None, 0.0) == wanted
    made = agreements.look(wanted, TWO, None, 0.0)
    assert made.proposal == Proposal(serial=1, attempt=0, step=7, flags=2, state=ProposalState.PROPOSED)
    fast = agreements.look(wanted, TWO, 1000.0, 0.0)
    assert fast.proposal.step >= 6 + 1000 * 2 * agreements.ROUND, "a fast one runs on until it hears"


def test_commit_takes_all_and_abort_takes_one() -> None:
    made = proposed()
    assert agreements.look(made, [answered(1, True), TWO[1]], None, 10.1) == made
    assert (
        agreements.look(made, [answered(1, True), answered(1, True)], None, 10.1).proposal.state
        is ProposalState.COMMITTED
    )
    aborted = agreements.look(made, [answered(1, False), TWO[1]], None, 10.1)
    assert aborted.proposal.state is ProposalState.ABORTED
    assert aborted.wanted == PLAIN, "it is wanted still"
    again = agreements.look(aborted, TWO, 100.0, 10.2)
    assert again.proposal.serial == 2
    assert again.proposal.step > 6 + 2 * 100 * 0.1, "twice the lead"


def test_an_answer_to_another_proposal_is_none() -> None:
    made = replace(proposed(), proposal=replace(proposed().proposal, serial=7))
    late = [answered(6, False), answered(6, True)]
    assert agreements.look(made, late, None, 10.1) == made


def test_a_node_that_is_silent_holds_nobody_up_for_ever() -> None:
    made = proposed()
    later = agreements.look(made, [answered(1, True), TWO[1]], None, 10.0 + agreements.PATIENCE + 0.1)
    assert later.proposal.state is ProposalState.ABORTED


def test_after_a_commit_the_next_waits_until_all_have_passed_it() -> None:
    made = agreements.look(proposed(), [answered(1, True)] * 2, None, 10.1)
    made, flags = agreements.served(made, 7)
    assert flags == PLAIN
    wanted = agreements.want(made, STOP)
    stands = [replace(one, first=7, last=7) for one in TWO]
    assert agreements.look(wanted, stands, None, 11.0) == wanted
    passed = [replace(one, first=8, last=9) for one in TWO]
    assert agreements.look(wanted, passed, None, 11.0).proposal.serial == 2


@pytest.mark.parametrize("ended", ["whole", "failed"])
def test_a_save_that_was_due_at_that_step_anyway_takes_nothing_from_what_is_proposed(ended: str) -> None:
    """All ranks had made it before they could see the proposal: a stop was lost."""
    wanted = agreements.want(Agreement(attempt=0), STOP)
    made = agreements.look(wanted, TWO, None, 10.0)
    step = made.proposal.step
    if ended == "whole":
        made, flags = agreements.served(made, step)
        assert not flags
    else:
        made = agreements.failed(made, step)
    refused = [replace(one, first=step, last=step, answer=Answer(serial=1, confirmed=False)) for one in TWO]
    aborted = agreements.look(made, refused, None, 10.1)
    assert aborted.proposal.state is ProposalState.ABORTED
    again = agreements.look(aborted, refused, None, 10.2)
    assert again.proposal.step > step
    assert again.proposal.purpose == STOP


def test_a_request_for_a_step_ahead_is_that_step() -> None:
    asked = agreements.request(Agreement(attempt=0), 9)
    assert agreements.look(asked, TWO, 1000.0, 0.0).proposal.step == 9
    late = agreements.request(Agreement(attempt=0), 6)
    assert agreements.look(late, TWO, None, 0.0).proposal.step == 7


def test_the_last_step_needs_no_agreement() -> None:
    wanted = agreements.want(Agreement(attempt=0), PLAIN)
    assert (
        agreements.look(wanted, [replace(one, total_steps=7) for one in TWO], None, 0.0).proposal.serial == 0
    )


def test_a_stop_whose_save_failed_is_asked_for_again_and_nothing_else_is() -> None:
    for flags, wanted in ((STOP, STOP), (PLAIN, None)):
        made = agreements.look(proposed(flags), [answered(1, True)] * 2, None, 10.1)
        assert agreements.failed(made, 7).wanted == wanted


def test_another_attempt_begins_with_a_new_proposal_whatever_became_of_the_last() -> None:
    for state in ProposalState:
        old = Proposal(serial=4, attempt=0, step=100, state=state)
        new = agreements.want(Agreement(attempt=1, proposal=old), PLAIN)
        made = agreements.look(new, TWO, None, 0.0)
        assert (made.proposal.serial, made.proposal.attempt) == (5, 1)


@pytest.mark.parametrize(
    ("posted", "order", "expected"),
    [
        ((0, ProposalState.NONE), (1, ProposalState.PROPOSED), Duty.ANSWER),
        ((1, ProposalState.PROPOSED), (1, ProposalState.PROPOSED), Duty.NOTHING),
        ((1, ProposalState.PROPOSED), (1, ProposalState.COMMITTED), Duty.COMMIT),
        ((1, ProposalState.PROPOSED), (1, ProposalState.ABORTED), Duty.ABORT),
        ((1, ProposalState.PROPOSED), (2, ProposalState.PROPOSED), Duty.ANSWER),
        ((1, ProposalState.COMMITTED), (1, ProposalState.COMMITTED), Duty.NOTHING),
        ((1, ProposalState.ABORTED), (1, ProposalState.COMMITTED), Duty.NOTHING),
        ((2, ProposalState.PROPOSED), (1, ProposalState.COMMITTED), Duty.NOTHING),
        ((1, ProposalState.PROPOSED), (2, ProposalState.ABORTED), Duty.NOTHING),
    ],
)
def test_what_a_node_does(
    posted: tuple[int, ProposalState], order: tuple[int, ProposalState], expected: Duty
) -> None:
    proposal = Proposal(serial=order[0], attempt=0, step=9, state=order[1])
    assert duty(Posted(serial=posted[0], state=posted[1]), proposal, 0) is expected
    assert duty(Posted(), replace(proposal, attempt=1), 0) is Duty.NOTHING


def test_the_test_finds_a_node_that_takes_its_word_back() -> None:
    """The rule that matters most, broken on purpose: a node that has confirmed lets its ranks go."""
    random_ = random.Random(3)
    for _ in range(200):
        world = World(2, 1)
        world.leader = agreements.want(world.leader, PLAIN)
        try:
            for _ in range(60):
                node = random_.randrange(2)
                play(world, random_.choice(ACTIONS[:7]), node, 0, 0.1, None)
                if world.nodes[1].posted.state is ProposalState.PROPOSED:
                    world.nodes[1]._write(world.nodes[1].posted.serial, ProposalState.ABORTED)
                world.check()
        except AssertionError:
            return
    raise AssertionError("the check has not noticed")
