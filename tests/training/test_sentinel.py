"""A rank's half of the guard: what is looked at when, and how the batches of steps that are left out are dropped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from supervisor.decide.guard import GuardPolicy
from supervisor.edge.control import SIZE, Word
from supervisor.training.loaders import LoaderState
from supervisor.training.metrics import Metrics
from supervisor.training.sentinel import Sentinel


class Bench:
    """A Sentinel behind real Metrics, and what it tells."""

    def __init__(self, **policy: Any) -> None:
        self.words = memoryview(bytearray(SIZE)).cast("Q")
        self.told: list[dict[str, Any]] = []
        self.loaders: dict[str, LoaderState] = {}
        sentinel = Sentinel(
            GuardPolicy(mode="nan", **policy),
            self.words,
            lambda kind, **values: self.told.append({"kind": kind, **values}),
            self.loaders,
        )
        self.step = 0
        self.metrics = Metrics(lambda _: None)
        self.metrics.watch = lambda values: sentinel.look(self.step, values)
        self.metrics.settle = sentinel.settle

    def log(self, **values: Any) -> None:
        self.metrics.log(values)
        self.step += 1

    @property
    def proven(self) -> int:
        return self.words[Word.PROVEN] - 1


@pytest.mark.parametrize(
    "value", [math.nan, torch.tensor(math.inf), torch.tensor([math.nan], requires_grad=True)]
)
def test_what_is_on_the_host_is_looked_at_at_once(value: object, recwarn: pytest.WarningsRecorder) -> None:
    bench = Bench()
    for good in (1.0, torch.tensor(2.0), 3):
        bench.log(loss=good)
    assert bench.proven == 2
    bench.log(loss=value, other=7.0)
    (told,) = bench.told
    assert (told["kind"], told["finding"], told["step"], told["good"]) == ("trouble", "nan", 3, 2)
    assert not recwarn


def test_what_is_on_a_device_is_not_waited_for_and_looked_at_when_it_is_read() -> None:
    """A tensor without any data stands for it: to look at it would raise."""
    bench = Bench()
    bench.metrics._next = math.inf  # nothing is published meanwhile
    bench.log(loss=1.0)
    bench.log(loss=torch.empty((), device="meta"))
    assert (bench.told, bench.proven) == ([], 0)
    bench.metrics._values["loss"] = math.nan  # … and now it has come over
    bench.metrics.flush()
    (told,) = bench.told
    assert (told["step"], told["good"]) == (1, 0)
    bench.metrics.flush()
    assert len(bench.told) == 1


def test_it_counts_the_batches_of_a_step() -> None:
    bench = Bench(skip=1)
    loader = StatefulDataLoader(list(range(40)), batch_size=2)
    bench.loaders["data"] = LoaderState("data", loader)
    batches = iter(loader)
    for _ in range(3):
        next(batches), next(batches), next(batches)
        bench.log(loss=1.0)
    bench.log(loss=math.nan)
    assert bench.told[0]["batches"] == {"data": 3}


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_batches_are_dropped_across_the_end_of_an_epoch(workers: dict[str, Any]) -> None:
    loader = StatefulDataLoader(list(range(5)), batch_size=1, **workers)
    state = LoaderState("data", loader)
    state.drop(1)  # before anybody iterates
    batches = iter(loader)
    assert [int(next(batches)) for _ in range(2)] == [1, 2]
    state.drop(4)  # two of this epoch, two of the next
    assert next(batches, None) is None
    assert state.get()["drop"] == 2
    assert [int(batch) for batch in iter(loader)] == [2, 3, 4]
    assert "drop" not in state.get()
    assert [int(batch) for batch in iter(loader)] == [0, 1, 2, 3, 4]


def test_what_is_still_to_be_dropped_is_state() -> None:
    loader = StatefulDataLoader(list(range(5)), batch_size=1)
    state = LoaderState("data", loader)
    batches = iter(loader)
    next(batches)
    state.drop(6)
    kept = state.get()
    other = StatefulDataLoader(list(range(5)), batch_size=1)
    LoaderState("data", other).put(kept)
    resumed = [int(batch) for epoch in range(2) for batch in iter(other)]
    mine = [int(batch) for epoch in range(2) for batch in iter(loader)]
    assert resumed[-8:] == mine[-8:]
