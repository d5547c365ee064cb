from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable

import pytest

from supervisor.decide.warning import BASE, RECENT, SETTLING, Change, Lookout, Sample
from supervisor.model import WarningKind

LONG = 4000


def changes(samples: Iterable[Sample], lookout: Lookout | None = None) -> list[Change]:
    lookout = lookout or Lookout()
    return [change for sample in samples for change in lookout.see(sample)]


def raised(found: list[Change]) -> Counter[WarningKind]:
    return Counter(change.kind for change in found if change.text is not None)


def training(seed: int, *, noise: float, exponent: float, tails: bool, count: int = LONG) -> list[Sample]:
    """A loss that falls by a power law, a norm and step times with noise of their own; ten steps a sample."""
    draw = random.Random(seed)
    width = lambda: math.sqrt(draw.gammavariate(1.5, 2) / 3) if tails else 1.0  # noqa: E731
    return [
        Sample(
            10 * index,
            1.7 + 2.5 * index**-exponent + noise * draw.gauss(0, 1) / width(),
            (1 + 3 * index**-0.3) * math.exp(0.5 * draw.gauss(0, 1)),
            0.3 * math.exp(0.1 * draw.gauss(0, 1)) + (2.0 if index % 50 == 0 else 0.0),  # an evaluation
            {0: 0.5 + 0.05 * draw.gauss(0, 1), 1: 0.5 + 0.05 * draw.gauss(0, 1)},
        )
        for index in range(1, count)
    ]


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.5])
def test_no_false_alarm_over_a_training_that_goes_well(exponent: float, tails: bool) -> None:
    """With noise of up to a tenth of the loss's range."""
    for seed, noise in enumerate((0.02, 0.1)):
        found = raised(changes(training(seed, noise=noise, exponent=exponent, tails=tails)))
        assert not found, (seed, noise)


def test_alarms_are_rare_even_where_noise_hides_what_is_learned() -> None:
    """A plateau may be seen then, and nothing else."""
    found: Counter[WarningKind] = Counter()
    for seed in range(8):
        found += raised(changes(training(seed, noise=0.3, exponent=0.3, tails=True)))
    assert not found.keys() - {WarningKind.PLATEAU}
    assert found.total() <= 2


def test_nan_is_raised_at_once_and_taken_back_when_it_is_over() -> None:
    values = [1.0, math.nan, math.nan, *[1.0] * 10]
    found = changes(Sample(step, loss) for step, loss in enumerate(values))
    assert [(change.kind, change.step, change.text) for change in found] == [
        (WarningKind.NAN, 1, "loss is nan since step 1"),
        (WarningKind.NAN, 7, None),
    ]


def test_an_infinite_norm_is_a_warning_when_it_stays() -> None:
    values = [1.0, math.inf, math.inf, 1.0, *[math.inf] * 5]
    found = changes(Sample(step, norm=norm) for step, norm in enumerate(values))
    assert [(change.kind, change.step) for change in found] == [(WarningKind.NAN, 8)]


def test_a_spike_is_raised_and_taken_back() -> None:
    draw = random.Random(0)
    losses = [2 + 0.1 * draw.gauss(0, 1) + (20 if 200 <= step < 204 else 0) for step in range(300)]
    found = changes(Sample(step, loss) for step, loss in enumerate(losses))
    assert [(change.kind, change.step, change.text is None) for change in found] == [
        (WarningKind.SPIKE, 201, False),
        (WarningKind.SPIKE, 204, True),
    ]
    assert str(found[0].text).startswith("loss has jumped to 2")
    assert "at step 200, it was 1.996" in str(found[0].text)


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_that_stops_falling_is_told_of_and_taken_back_when_it_falls_again(seed: int) -> None:
    draw = random.Random(seed)
    flat = [2 + 2 * math.exp(-step / 300) + 0.1 * draw.gauss(0, 1) for step in range(16_000)]
    again = [1.8 + 0.1 * draw.gauss(0, 1) for _ in range(4000)]
    found = changes(Sample(step, loss) for step, loss in enumerate(flat + again))
    assert found[0].kind is WarningKind.PLATEAU
    assert 1000 < found[0].step < 16_000
    assert found[0].text is not None
    assert found[0].text.startswith("loss has not fallen since step ")
    assert found[-1].text is None


def test_gradients_that_grow() -> None:
    draw = random.Random(0)
    norms = [math.exp(0.5 * draw.gauss(0, 1) + max(0, step - 500) * 0.01) for step in range(1500)]
    (found,) = changes(Sample(step, norm=norm) for step, norm in enumerate(norms))
    assert found.kind is WarningKind.GRADIENTS
    assert 600 < found.step < 1000
    assert "grad_norm has grown 10-fold" in str(found.text)


def paces(seconds: list[tuple[float, dict[int, float]]]) -> list[Sample]:
    return [Sample(step, seconds=time, own_shares=shares) for step, (time, shares) in enumerate(seconds)]


def test_steps_that_get_slower_name_the_rank_that_makes_them_so() -> None:
    draw = random.Random(0)
    early = [(0.2 + 0.01 * draw.random(), {0: 0.5, 1: 0.5}) for _ in range(SETTLING + BASE + RECENT)]
    late = [(0.5 + 0.01 * draw.random(), {0: 0.2, 1: 0.8}) for _ in range(60)]
    (found,) = changes(paces(early + late))
    assert (found.kind, found.rank) == (WarningKind.SLOWER, 1)
    assert "rank 1's own time" in str(found.text)
    (found,) = changes(each._replace(world_size=2, nodes=("h1", "h2")) for each in paces(early + late))
    assert str(found.text).endswith("rank 1's own time, on node h2")
    all_alike = [(0.5, {0: 0.5, 1: 0.5}) for _ in range(60)]
    lookout = Lookout()
    (found,) = changes(paces(early + all_alike), lookout)
    assert found.rank is None
    later = [(0.2, {0: 0.5, 1: 0.5})] * 60
    back = changes((Sample(1000 + step, seconds=time) for step, (time, _) in enumerate(later)), lookout)
    assert [(change.kind, change.text) for change in back] == [(WarningKind.SLOWER, None)]


def test_a_new_attempt_has_a_pace_of_its_own_and_steps_done_again_say_nothing_new() -> None:
    lookout = Lookout()
    before = paces([(0.2, {})] * 100)
    after = [(0.5, {})] * 100
    assert not changes(before, lookout)
    lookout.begin()
    assert not changes(paces(after), lookout)
    assert not lookout.see(Sample(50, loss=math.nan))
    assert lookout.see(Sample(100, loss=math.nan))
