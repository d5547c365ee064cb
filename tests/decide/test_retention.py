"""Retention: what the rules keep, and that the newest good one always is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide.retention import KeepBest, Mode, RetentionPolicy, to_remove
from supervisor.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """As much of a checkpoint as the rules look at."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str | None = None


def records(*steps: int) -> list[Record]:
    return [Record(step) for step in steps]


def best(losses: dict[int, float | None], count: int, mode: Mode = Mode.MIN) -> set[int]:
    """Steps that keep_best keeps beside the newest one."""
    found = [Record(step, {} if loss is None else {"loss": loss}) for step, loss in losses.items()]
    policy = RetentionPolicy(keep_last=1, keep_best=KeepBest(metric="loss", mode=mode, count=count))
    return {record.step for record in found} - to_remove(found, policy) - {max(losses)}


def test_the_last_are_kept_in_whatever_order_they_come() -> None:
    assert to_remove(records(300, 100, 500, 200, 400), RetentionPolicy(keep_last=2)) == {100, 200, 300}


def test_the_default_keeps_three() -> None:
    assert to_remove(records(1, 2, 3, 4, 5), RetentionPolicy()) == {1, 2}


def test_multiples_are_kept_for_good() -> None:
    policy = RetentionPolicy(keep_last=1, keep_every=1000)
    assert to_remove(records(0, 500, 1000, 1500, 2000, 2500), policy) == {500, 1500}


def test_the_best_are_kept() -> None:
    losses = {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.2, 5: 9.0}
    assert best(losses, 2) == {2, 4}
    assert best(losses, 2, Mode.MAX) == {1}  # and 5, which is the newest
    assert best(losses, 99) == {1, 2, 3, 4}


def test_of_equals_the_newer_is_better() -> None:
    losses: dict[int, float | None] = {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.5}
    assert best(losses, 2) == {2, 3}
    assert best(losses, 1, Mode.MAX) == set()  # 4, which is the newest
    assert best({1: 0.1, 2: 0.1, 3: 0.0}, 1, Mode.MAX) == {2}


@pytest.mark.parametrize("mode", list(Mode))
def test_a_metric_that_is_missing_or_not_finite_is_never_best(mode: Mode) -> None:
    losses = {1: math.nan, 2: None, 3: math.inf, 4: -math.inf, 5: 0.5, 6: math.nan}
    assert best(losses, 3, mode) == {5}


def test_those_with_a_problem_count_for_nothing_and_are_left_alone() -> None:
    found = [Record(1), Record(2), Record(3, problem="truncated"), Record(-1, problem="not a name")]
    assert to_remove(found, RetentionPolicy(keep_last=1)) == {1}


def test_the_protected_are_kept() -> None:
    assert to_remove(records(1, 2, 3), RetentionPolicy(keep_last=1), protected={1, 77}) == {2}


def test_nothing_in_nothing_out() -> None:
    assert to_remove([], RetentionPolicy()) == set()


# --------------------------------------------------------------------------- properties

metrics = st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.floats() | st.integers(0, 3).map(float))
jobs = st.lists(
    st.builds(Record, st.integers(0, 60), metrics, st.none() | st.just("damaged")),
    unique_by=lambda record: record.step,
)
rules = st.builds(
    KeepBest,
    metric=st.sampled_from(["loss", "accuracy"]),
    mode=st.sampled_from(Mode),
    count=st.integers(1, 5),
)
policies = st.builds(
    RetentionPolicy,
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 20),
    keep_best=st.none() | rules,
)


@given(found=jobs, policy=policies, protected=st.sets(st.integers(0, 60)))
def test_it_keeps_what_the_policy_says(
    found: list[Record], policy: RetentionPolicy, protected: set[int]
) -> None:
    removed = to_remove(found, policy, protected)
    good = [record for record in found if record.problem is None]
    steps = sorted(record.step for record in good)
    assert removed <= set(steps)  # only good ones, that exist
    assert not removed & set(steps[-policy.keep_last :])  # so never the newest good one
    assert not removed & protected
    if policy.keep_every:
        assert not any(step % policy.keep_every == 0 for step in removed)
    if policy.keep_best:
        rule = policy.keep_best
        sign = 1 if rule.mode is Mode.MIN else -1
        value = {r.step: sign * r.metrics.get(rule.metric, math.nan) for r in good}
        for step in removed:
            if math.isfinite(value[step]):
                better = [
                    s for s in steps if math.isfinite(value[s]) and (value[s], -s) < (value[step], -step)
                ]
                assert len(better) >= rule.count


@given(found=jobs, policy=policies)
def test_each_removed_is_wanted_by_no_rule_alone(found: list[Record], policy: RetentionPolicy) -> None:
    alone = [RetentionPolicy(keep_last=policy.keep_last)]
    if policy.keep_every:
        alone.append(RetentionPolicy(keep_last=1, keep_every=policy.keep_every))
    if policy.keep_best:
        alone.append(RetentionPolicy(keep_last=1, keep_best=policy.keep_best))
    assert to_remove(found, policy) == set.intersection(*(to_remove(found, single) for single in alone))


@given(found=jobs, policy=policies)
def test_once_removed_there_is_nothing_more_to_remove(found: list[Record], policy: RetentionPolicy) -> None:
    removed = to_remove(found, policy)
    assert to_remove([record for record in found if record.step not in removed], policy) == set()


@given(found=jobs, policy=policies, extra=st.integers(1, 5))
def test_keeping_more_removes_no_more(found: list[Record], policy: RetentionPolicy, extra: int) -> None:
    more = RetentionPolicy(
        keep_last=policy.keep_last + extra, keep_every=policy.keep_every, keep_best=policy.keep_best
    )
    assert to_remove(found, more) <= to_remove(found, policy)


@given(found=jobs, policy=policies)
def test_what_was_removed_stays_removed_when_a_newer_one_comes(
    found: list[Record], policy: RetentionPolicy
) -> None:
    newer = [*found, Record(61, {"loss": 1.0})]
    assert to_remove(found, policy) <= to_remove(newer, policy)


# --------------------------------------------------------------------------- policies


def test_a_rule_is_parsed() -> None:
    assert KeepBest.parse("loss:min:3") == KeepBest(metric="loss", mode=Mode.MIN, count=3)
    assert KeepBest.parse("eval:top1:max:12") == KeepBest(metric="eval:top1", mode=Mode.MAX, count=12)


@pytest.mark.parametrize(
    "text", ["", "loss", "loss:min", "loss:low:3", "loss:min:x", "loss:min:", "loss:min:-1", "loss:min:²"]
)
def test_a_rule_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"METRIC:min\|max:M is required, e\.g\. loss:min:3"):
        KeepBest.parse(text)


def test_policies_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep_last of 0"):
        RetentionPolicy(keep_last=0)
    with pytest.raises(ConfigError, match="keep_every of 0 steps"):
        RetentionPolicy(keep_every=0)
    with pytest.raises(ConfigError, match="keep_best of 0"):
        KeepBest.parse("loss:min:0")
    with pytest.raises(ConfigError, match="name of a metric"):
        KeepBest.parse(":min:1")
