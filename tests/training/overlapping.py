"""Trainings whose every step is a save point, for tests of copies behind the next step; on the CPU, and with copies that are queued."""

from __future__ import annotations

import copy
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from supervisor.errors import StorageError
from supervisor.training import moves
from supervisor.training.engine import ArenaWriter
from supervisor.training.flight import Flight
from supervisor.training.items import Items
from supervisor.training.layout import is_plain
from supervisor.training.state import TrainingState
from supervisor.training.world import World
from supervisor.training.writer import READY, StaleError, TornError, Written
from tests.training.slow_gpu import SlowGpu

AdamW = torch.optim.AdamW
WIDTH = 300  # its matrices are large ones, its biases small


class Run:
    """A training whose every step is a save point; what is read back is compared as soon as it is said to be whole.

    What should be there, somebody tells who has never seen the training before.
    """

    def __init__(self, root: Path, values: dict[str, Any] | None = None, **objects: Any) -> None:
        torch.manual_seed(0)
        self.root = root
        self.objects = objects
        self.values = {} if values is None else values
        self.world = world = World()
        self.state = TrainingState(objects, self.values, world)
        self.writer = ArenaWriter(
            world,
            cleans=True,
            optimizers=self.state.optimizers,
            completed=lambda: self.step,
            slots=[root / str(slot) for slot in range(3)],
        )
        self.step = 0
        self.good: list[int] = []
        self.torn: list[int] = []
        self.put_off: list[int] = []
        self.behind = 0
        self.hasty = 0
        self.stale: list[int] = []

    def run(self, steps: int, one: Callable[[int], object]) -> None:
        for _ in range(steps):
            one(self.step)
            self.step += 1
            self.writer.poll()
            self.save()
        self.writer.flush()

    def save(self, *, behind: bool = True) -> None:
        step = self.step
        directory = self.root / str(step % 3)
        expected: dict[tuple[str | int, ...], Any] = {}

        def gather() -> Items:
            items = self.state.gather_hastily(step)
            expected.update(self.expected(step))
            return items

        def finished(outcome: Written | StorageError | None) -> None:
            if outcome is None:
                self.put_off.append(step)
                return
            if isinstance(outcome, TornError):
                (self.stale if isinstance(outcome, StaleError) else self.torn).append(step)
                return
            assert isinstance(outcome, Written), outcome
            with torch.device("cpu"):
                found = _load_state_dict_from_keys(checkpoint_id=directory)
            for path, value in expected.items():
                part = functools.reduce(operator.getitem, path, found)
                if isinstance(value, torch.Tensor):
                    assert torch.equal(bits(part).cpu(), bits(value).cpu()), f"{path} of step {step}"
                elif is_plain(value):
                    assert part == value, f"{path} of step {step}"
            assert found["session"]["step"] == step
            self.good.append(step)

        agreed = self.writer.ask(gather, behind=behind)
        self.hasty += agreed == READY
        self.writer.write(directory, gather, finished, behind=behind, agreed=agreed)
        self.behind += self.writer.is_busy

    def expected(self, step: int) -> dict[tuple[str | int, ...], Any]:
        """Copies of all values, by the path to each."""
        now = TrainingState(self.objects, self.values, self.world).gather(step).whole()
        return {
            now.paths[key]: value.detach().clone()
            if isinstance(value, torch.Tensor)
            else copy.deepcopy(value)
            for key, value in now.values.items()
        }


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Copies behind a step begin when it is set, as it is now."""
    let_go, fly = threading.Event(), Flight.run
    let_go.set()

    def late(flight: Flight) -> None:
        let_go.wait()
        fly(flight)

    monkeypatch.setattr(Flight, "run", late)
    return let_go


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return moves.local_of(tensor).detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(
    autouse=True,
    params=[
        "cpu",
        "slow gpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.may_skip("few machines that run the tests have a GPU"),
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
            ],
        ),
    ],
)
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowGpu | None]:
    """Everything holds with copies that are queued, too."""
    slow = SlowGpu() if request.param == "slow gpu" else None
    if slow is not None:
        slow.install(monkeypatch)
    with torch.device("cuda" if request.param == "cuda" else "cpu"):
        yield slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    _global_optimizer_pre_hooks.clear()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
    )


def train(model: nn.Module, *optimizers: Any, times: int = 1) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    for _ in range(times):
        model(torch.randn(16, 8)).pow(2).mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def adapted() -> tuple[nn.Module, AdamW]:
    """A model of which only the head is trained."""
    model = net()
    for part in (model[0], model[3]):
        part.requires_grad_(False)
    return model, AdamW([p for p in model.parameters() if p.requires_grad])


def waiting(run: Run) -> list[int]:
    """Where that lies for which the training stood, for each slot; but buffers, for which it always does."""
    buffers = {b.data_ptr() for module in run.state.modules.values() for b in module.buffers()}
    slots = run.writer._rack._slots.values()
    places = [tensor.data_ptr() for slot in slots for tensor in slot.now.tensors]
    return [place for place in places if place not in buffers]
