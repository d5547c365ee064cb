from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import guard
from supervisor.decide.guard import NEAR, WARM_UP, Finding, GuardPolicy, Known, Watch
from supervisor.errors import ConfigError
from supervisor.failing import Trouble, TroubleKind

SPIKE = GuardPolicy(mode="spike")
NOT_FINITE = [math.nan, math.inf, -math.inf]
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


def noisy(seed: int, count: int, *, tails: bool = False, noise: float = 0.2) -> list[float]:
    """A loss that falls by a power law under noise; ``tails``: of Student's t with three degrees of freedom."""
    draw = random.Random(seed)
    width = lambda: math.sqrt(draw.gammavariate(1.5, 2) / 3) if tails else 1.0  # noqa: E731
    return [1.7 + 3 * (step + 1) ** -0.3 + noise * draw.gauss(0, 1) / width() for step in range(count)]


def fed(watch: Watch, losses: list[float]) -> list[Finding]:
    found = (watch.loss(step, loss) for step, loss in enumerate(losses))
    return [finding for finding in found if finding is not None]


class TestNan:
    @given(st.lists(numbers, max_size=20), st.sampled_from(NOT_FINITE), st.sampled_from(["nan", "spike"]))
    def test_found_at_once_and_told_once(self, before: list[float], value: float, mode: str) -> None:
        watch = Watch(GuardPolicy(mode=mode))
        (found,) = fed(watch, [*before, value, 1.0, value])
        assert (found.kind, found.step) == (TroubleKind.NAN, len(before))

    def test_what_is_proven_is_the_last_step_before_it(self) -> None:
        watch = Watch(GuardPolicy(mode="nan"))
        assert watch.good is None
        for step in (0, 100, 200):  # logged now and then
            watch.loss(step, 1.0)
        watch.loss(300, math.nan)
        assert watch.good == 200

    def test_a_norm_may_be_infinite_while_a_scaler_searches(self) -> None:
        watch = Watch(GuardPolicy(mode="nan"))
        patience = guard.NORM_PATIENCE
        assert not any(watch.norm(step, math.inf) for step in range(patience - 1))
        assert watch.norm(patience - 1, 1.0) is None
        found = [watch.norm(step, math.nan) for step in range(patience, 2 * patience)]
        assert found[:-1] == [None] * (patience - 1)
        assert found[-1] is not None
        assert found[-1].step == patience


class TestSpike:
    @pytest.mark.parametrize("tails", [False, True])
    def test_a_rise_that_lasts_is_found_with_its_first_step(self, tails: bool) -> None:
        losses = [*noisy(1, 300, tails=tails), *[30.0] * 5]
        watch = Watch(SPIKE)
        (found,) = fed(watch, losses)
        assert (found.kind, found.step, found.value) == (TroubleKind.SPIKE, 300, 30.0)
        assert found.usual == pytest.approx(2.3, abs=0.3)
        assert watch.good == 299

    def test_shorter_than_its_patience_is_none(self) -> None:
        assert not fed(Watch(SPIKE), [*noisy(2, 300), 30.0, 30.0, *noisy(2, 300)[200:]])

    def test_is_off_without_being_asked_for(self) -> None:
        assert not fed(Watch(GuardPolicy(mode="nan")), [*noisy(3, 300), *[30.0] * 50])

    def test_nothing_is_judged_at_the_beginning(self) -> None:
        assert not fed(Watch(SPIKE), [1.0] * 10 + [50.0] * (WARM_UP - 10))

    def test_a_level_that_stays_and_is_not_agreed_on_becomes_the_usual_one(self) -> None:
        losses = [*noisy(4, 300), *(value + 20 for value in noisy(4, 1000))]
        watch = Watch(SPIKE)
        assert len(fed(watch, losses)) == 1
        assert not watch.is_rising
        assert watch.good == len(losses) - 1

    def test_a_level_that_was_accepted_is_usual_from_there_on(self) -> None:
        higher = [value + 20 for value in noisy(4, 300)]
        later = [value + 90 for value in noisy(4, 100)]
        losses = [*noisy(4, 300), *higher, *later]
        assert [found.step for found in fed(Watch(SPIKE), losses[:600])] == [300]
        watch = Watch(SPIKE, Known(levels=[300 - NEAR]))  # another rank saw it so much sooner
        (found,) = fed(watch, losses)
        assert (found.kind, found.step) == (TroubleKind.SPIKE, 600), "the next jump is one again"
        assert found.usual == pytest.approx(22, abs=0.5)
        assert watch.good is not None

    def test_another_jump_than_the_accepted_one_is_found(self) -> None:
        losses = [*noisy(4, 300), *(value + 20 for value in noisy(4, 300))]
        watch = Watch(SPIKE, Known(levels=[299 - NEAR]))
        assert [found.step for found in fed(watch, losses)] == [300]

    def test_the_jump_gone_back_for_is_known_again_before_the_warm_up_is_over(self) -> None:
        losses = [*noisy(4, 300), *(value + 20 for value in noisy(4, 300))]
        (first,) = fed(Watch(SPIKE), losses)
        assert first.limit is not None
        for resumed in (300, 290, 251):
            later = Watch(SPIKE, Known(step=first.step, limit=first.limit))
            found = [later.loss(step, losses[step]) for step in range(resumed, 400)]
            assert [one.step for one in found if one is not None] == [300]
            accepted = Watch(SPIKE, Known(levels=[300], step=first.step, limit=first.limit))
            assert not any(accepted.loss(step, losses[step]) for step in range(resumed, 400))
            assert accepted.good == 399

    def test_what_was_a_jump_is_none_elsewhere(self) -> None:
        watch = Watch(SPIKE, Known(step=10 + NEAR, limit=2.0))
        assert not any(watch.loss(step, 3.0) for step in range(10))

    def test_a_level_is_no_excuse_for_nan(self) -> None:
        (found,) = fed(Watch(SPIKE, Known(levels=[300])), [*noisy(4, 300), math.nan])
        assert found.kind is TroubleKind.NAN

    @pytest.mark.parametrize("tails", [False, True])
    @pytest.mark.parametrize("noise", [0.01, 0.2, 1.0])
    def test_no_false_alarm_over_noise(self, noise: float, tails: bool) -> None:
        for seed in range(5):
            assert not fed(Watch(SPIKE), noisy(seed, 10_000, tails=tails, noise=noise))

    @given(st.integers(0, 10_000), st.floats(0.01, 1000), st.floats(0.0, 100))
    def test_the_scale_does_not_matter(self, seed: int, scale: float, jump: float) -> None:
        losses = [*noisy(seed, 120), *[2.5 + jump] * 4]
        one = fed(Watch(SPIKE), losses)
        assert [found.step for found in fed(Watch(SPIKE), [scale * loss for loss in losses])] == [
            found.step for found in one
        ]


def trouble(rank: int, step: int, kind: TroubleKind = TroubleKind.SPIKE, good: int | None = None) -> Trouble:
    return Trouble(kind=kind, metric="loss", rank=rank, step=step, value=9.0, usual=2.0, good=good)


class TestAgree:
    def test_one_rank_is_enough_for_nan(self) -> None:
        seen = {3: trouble(3, 50, TroubleKind.NAN), 1: trouble(1, 49, TroubleKind.NAN), 2: trouble(2, 10)}
        assert guard.agree(seen, 1000) == seen[1]

    @given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 1000))
    def test_a_spike_takes_more_than_half_of_those_that_watch(
        self, watching: int, see: int, step: int
    ) -> None:
        seen = {rank: trouble(rank, step + rank, good=step + rank - 1) for rank in range(min(see, watching))}
        agreed = guard.agree(seen, watching)
        assert (agreed is not None) == (2 * len(seen) > watching)
        if agreed is not None:
            assert (agreed.rank, agreed.step, agreed.good) == (0, step, step - 1)

    def test_spikes_far_apart_are_not_the_same(self) -> None:
        assert guard.agree({0: trouble(0, 10), 1: trouble(1, 100)}, 2) is None

    def test_what_one_rank_cannot_vouch_for_nobody_can(self) -> None:
        agreed = guard.agree({0: trouble(0, 10, good=9), 1: trouble(1, 11)}, 2)
        assert agreed is not None
        assert agreed.good is None


def test_in_plain_words() -> None:
    assert guard.reason(trouble(1, 140)) == "loss has jumped to 9, it was 2, in step 140 (rank 1)"


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "all"},
        {"factor": 1.0},
        {"factor": math.nan},
        {"patience": 0},
        {"times": -1},
        {"back": 0},
        {"norm": "loss"},
    ],
)
def test_policies_that_make_no_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        GuardPolicy(**values)  # type: ignore[arg-type]
