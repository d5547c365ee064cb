"""The agreement, run by a simulator in which every read and write of a shared word can interleave with every other one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import savepoint
from supervisor.decide.savepoint import Move
from supervisor.model import ProposalState

Judge = Callable[[int, list[int], set[int]], ProposalState]


@dataclass
class Page:
    step: int = 0
    word: int = 0
    proposal_step: int = 0


@dataclass
class World:
    """N ranks that meet in a collective in every step and in every save, and a supervisor that proposes and judges."""

    ranks: int
    total: int
    judge: Judge
    pages: list[Page] = field(default_factory=list)
    saves: list[list[int]] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)  # collectives each rank has entered
    waiting: list[tuple[int, int]] = field(default_factory=list)  # messages (rank, step) under way
    violations: list[int] = field(default_factory=list)
    verdicts: list[tuple[int, ProposalState]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pages = [Page() for _ in range(self.ranks)]
        self.saves = [[] for _ in range(self.ranks)]
        self.entered = [0] * self.ranks

    def meet(self, rank: int) -> Iterator[bool]:
        """A collective: done when all have entered it. Yields whether something was done."""
        self.entered[rank] += 1
        mine = self.entered[rank]
        while min(self.entered) < mine:
            yield False
        yield True

    def worker(self, rank: int) -> Iterator[bool]:
        page, served = self.pages[rank], 0
        for completed in range(1, self.total + 1):
            yield from self.meet(rank)
            page.step = completed  # W1
            yield True
            while True:
                word = page.word  # W2
                yield True
                move = savepoint.judge_word(word, page.proposal_step, completed, served)
                yield True
                if move is not Move.WAIT:
                    break
                self.waiting.append((rank, completed))
                while page.word == word:
                    yield False
            if move is Move.VIOLATION:
                self.violations.append(rank)
                return
            if move is Move.SAVE:
                served, _ = savepoint.split_word(word)
                yield from self.meet(rank)
                self.saves[rank].append(completed)

    def steps(self) -> Iterator[bool]:
        self.read: list[int] = []
        for page in self.pages:
            self.read.append(page.step)
            yield False  # looking moves nothing

    def supervisor(self, wants: list[tuple[int, int | None]]) -> Iterator[bool]:
        """Each want is (margin, the step a rank asked for)."""
        serial, state, step = 0, ProposalState.NONE, 0
        standing: dict[int, int] = {}
        for lead, request in wants:
            aborted = 0
            while state is not ProposalState.COMMITTED or aborted == 0:
                yield from self.steps()
                if max(self.read) >= self.total - 1:
                    return
                if not savepoint.may_propose(state, step, self.read):
                    yield False
                    continue
                margin = min(lead << aborted, 64)
                step = savepoint.propose_request(request or 0, self.read, margin)
                if not savepoint.in_reach(step, self.total):
                    return
                serial, state = serial + 1, ProposalState.PROPOSED
                for page in self.pages:
                    page.proposal_step = step  # S1
                    yield True
                yield from self.publish(serial, state)  # S2
                while self.waiting and self.draw_late():
                    rank, where = self.waiting.pop(0)
                    standing[rank] = where
                yield from self.steps()  # S4
                known = {rank for rank, where in standing.items() if where == step}
                state = self.judge(step, list(self.read), known)
                self.verdicts.append((step, state))
                yield from self.publish(serial, state)  # S5
                aborted += 1
                if state is ProposalState.COMMITTED:
                    break

    draw_late: Callable[[], bool] = lambda: True

    def publish(self, serial: int, state: ProposalState) -> Iterator[bool]:
        for page in self.pages:
            page.word = savepoint.word(serial, state)
            yield True

    def run(self, chance: random.Random, wants: list[tuple[int, int | None]]) -> bool:
        """Interleave at random until all have ended; False when nobody can do anything any more."""
        self.draw_late = lambda: chance.random() < 0.7
        actors = [*(self.worker(rank) for rank in range(self.ranks)), self.supervisor(wants)]
        speeds = [chance.choice([1, 1, 5, 30]) for _ in actors]
        idle = 0
        while actors:
            index = chance.choices(range(len(actors)), speeds)[0]
            try:
                idle = 0 if next(actors[index]) else idle + 1
            except StopIteration:
                del actors[index], speeds[index]
                idle = 0
            if idle > 400 * len(actors) * max(speeds, default=1):
                return False
        return True


def honest(step: int, steps: list[int], standing: set[int]) -> ProposalState:
    return savepoint.judge(step, steps, standing)


def rash(step: int, steps: list[int], standing: set[int]) -> ProposalState:
    return ProposalState.COMMITTED


WANTS = st.lists(st.tuples(st.integers(1, 4), st.none() | st.integers(1, 40)), min_size=1, max_size=5)


@given(st.integers(1, 5), st.integers(3, 40), WANTS, st.integers(0, 1 << 32))
def test_all_ranks_save_the_same_steps_and_nobody_waits_for_ever(
    ranks: int, total: int, wants: list[tuple[int, int | None]], seed: int
) -> None:
    world = World(ranks, total, honest)
    assert world.run(random.Random(seed), wants), "deadlock"
    assert world.violations == []
    committed = [step for step, state in world.verdicts if state is ProposalState.COMMITTED]
    assert all(saves == committed for saves in world.saves)
    assert [page.step for page in world.pages] == [total] * ranks


def test_the_simulator_finds_a_supervisor_that_does_not_look_again() -> None:
    def goes_wrong(seed: int) -> bool:
        world = World(3, 30, rash)
        ended = world.run(random.Random(seed), [(1, None)] * 4)
        return not ended or world.violations != [] or len({tuple(saves) for saves in world.saves}) > 1

    assert any(goes_wrong(seed) for seed in range(200))


class TestJudgeWord:
    @pytest.mark.parametrize(
        ("state", "step", "move"),
        [
            (ProposalState.NONE, 10, Move.GO_ON),
            (ProposalState.ABORTED, 10, Move.GO_ON),
            (ProposalState.PROPOSED, 11, Move.GO_ON),
            (ProposalState.PROPOSED, 10, Move.WAIT),
            (ProposalState.PROPOSED, 9, Move.GO_ON),
            (ProposalState.COMMITTED, 11, Move.GO_ON),
            (ProposalState.COMMITTED, 10, Move.SAVE),
            (ProposalState.COMMITTED, 9, Move.VIOLATION),
        ],
    )
    def test_after_ten_steps(self, state: ProposalState, step: int, move: Move) -> None:
        assert savepoint.judge_word(savepoint.word(5, state), step, 10, served=4) is move

    def test_a_proposal_is_served_once(self) -> None:
        word = savepoint.word(5, ProposalState.COMMITTED)
        assert savepoint.judge_word(word, 10, 10, served=5) is Move.GO_ON
        assert savepoint.judge_word(word, 10, 11, served=5) is Move.GO_ON


class TestSupervisor:
    def test_proposes_ahead_of_every_rank(self) -> None:
        assert savepoint.propose([3, 9, 7], 2) == 11
        assert savepoint.propose([3], 0) == 4
        with pytest.raises(ValueError, match="rank"):
            savepoint.propose([], 1)

    def test_keeps_a_request_that_all_can_make(self) -> None:
        assert savepoint.propose_request(10, [9, 8], 3) == 10
        assert savepoint.propose_request(10, [10, 8], 3) == 13

    def test_a_rank_at_the_step_counts_only_if_it_is_known_to_stand(self) -> None:
        assert savepoint.judge(10, [9, 8]) is ProposalState.COMMITTED
        assert savepoint.judge(10, [10, 8]) is ProposalState.ABORTED
        assert savepoint.judge(10, [10, 8], {0}) is ProposalState.COMMITTED
        assert savepoint.judge(10, [11, 8], {0}) is ProposalState.ABORTED
        assert savepoint.judge(10, []) is ProposalState.ABORTED

    def test_waits_with_the_next_until_the_last_is_served(self) -> None:
        assert savepoint.may_propose(ProposalState.NONE, 0, [0, 0])
        assert savepoint.may_propose(ProposalState.ABORTED, 10, [3, 3])
        assert not savepoint.may_propose(ProposalState.PROPOSED, 10, [11, 11])
        assert not savepoint.may_propose(ProposalState.COMMITTED, 10, [11, 10])
        assert savepoint.may_propose(ProposalState.COMMITTED, 10, [11, 12])

    def test_the_last_step_needs_no_agreement(self) -> None:
        assert savepoint.in_reach(99, 100)
        assert not savepoint.in_reach(100, 100)
        assert savepoint.in_reach(10**9, None)

    def test_the_margin_doubles_with_every_abort(self) -> None:
        assert [savepoint.margin(100.0, n) for n in range(4)] == [3, 6, 12, 24]
        assert savepoint.margin(None) == 1
        assert savepoint.margin(1e6, 1000) == 1 << 20


@given(st.integers(1, 1 << 61), st.sampled_from(ProposalState))
def test_a_word_tells_serial_and_state(serial: int, state: ProposalState) -> None:
    assert savepoint.split_word(savepoint.word(serial, state)) == (serial, state)
