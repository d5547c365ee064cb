"""A training that is changed in the middle, as notebooks, schedules and recoveries do: what was remembered of it is not believed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from supervisor.training import Session, overlap
from tests.training.overlapping import AdamW, Run, net, one_thread, slow, train
from tests.training.slow_gpu import SlowGpu

__all__ = ["one_thread", "slow"]

SEEDS = 8
STEPS = 26


def all_are_good_or_stale(run: Run, steps: int) -> None:
    assert sorted(run.good + run.stale) == list(range(1, steps + 1))
    assert run.behind > 2


@pytest.mark.parametrize("how", ["loaded", "another dict"])
def test_the_optimizer_goes_back_to_an_older_state(how: str, tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    kept: list[Any] = []

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 1:
            kept.append(copy.deepcopy(optimizer.state_dict()))
        if step == 6 and how == "loaded":
            optimizer.load_state_dict(kept[0])
        if step == 6 and how == "another dict":
            optimizer.state = copy.copy(optimizer.state)
            optimizer.state.clear()

    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(12, one)
    all_are_good_or_stale(run, 12)


def swapped(model: Any) -> None:
    model[3], model[4] = model[4], model[3]


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[3], "weight", 0.5)


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(model[3], "weight", nn.Identity())


def renamed(model: Any) -> None:
    model.another = model._modules.pop("4")


@pytest.mark.parametrize("change", [swapped, pruned, parametrized, renamed])
def test_parameters_get_other_names(change: Callable[[nn.Module], None], tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(8, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Linear(70, 70), nn.Linear(70, 70)
        )
        return model, AdamW(model.parameters())

    model, optimizer = made()
    run = Run(tmp_path / "slots", model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 6:
            change(model)

    run.run(12, one)
    all_are_good_or_stale(run, 12)

    model, optimizer = made()
    with Session(dir=tmp_path / "job", checkpoint_every="1step", model=model, optimizer=optimizer) as session:
        for step in session.steps(8):
            one(step)
    again, other = made()
    change(again)
    with Session(dir=tmp_path / "job", model=again, optimizer=other) as session:
        assert session.step == 8
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], other.state[theirs]["exp_avg"])


class Counting(nn.Linear):
    """Its extra state is the very dict that it counts in."""

    def __init__(self) -> None:
        super().__init__(8, 80)
        self.counts = {"seen": 0, "sizes": [1]}

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.counts["seen"] += len(value)  # type: ignore[operator]
        self.counts["sizes"].append(len(value))  # type: ignore[attr-defined]
        return super().forward(value)

    def get_extra_state(self) -> Any:
        return self.counts

    def set_extra_state(self, state: Any) -> None:
        self.counts = state


class Noting(torch.optim.SGD):
    """Keeps a list of its own in its state."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.state[self.param_groups[0]["params"][0]].setdefault("losses", []).append(len(self.state))
        return loss


def test_values_that_are_changed_in_place(tmp_path: Path) -> None:
    model = nn.Sequential(Counting(), nn.Linear(80, 80))
    optimizer = Noting(model.parameters(), lr=0.1, momentum=0.9)
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(8, lambda _: train(model, optimizer))
    all_are_good_or_stale(run, 8)


# --------------------------------------------------------------------------- anything at all


class Changes:
    """Things that a script may do to its training between two steps, or at the beginning of one; ``random`` chooses."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, chance: random.Random) -> None:
        self.model, self.optimizer, self.chance = model, optimizer, chance
        self.values: dict[str, Any] = {"list": []}

    def one(self) -> None:
        names = sorted(name for name in dir(self) if name.startswith("do_"))
        getattr(self, self.chance.choice(names))()

    def _parameter(self) -> nn.Parameter:
        return self.chance.choice(list(self.model.parameters()))

    def do_move_data(self) -> None:
        parameter = self._parameter()
        parameter.data = parameter.data.clone()

    def do_scale_weights(self) -> None:
        with torch.no_grad():
            self._parameter().mul_(0.9)

    def do_load_the_model(self) -> None:
        self.model.load_state_dict(
            {k: v * 0.5 if v.is_floating_point() else v for k, v in self.model.state_dict().items()}
        )

    def do_thaw_or_freeze(self) -> None:
        layer = self.chance.choice([self.model[3], self.model[4]])
        layer.requires_grad_(not layer.weight.requires_grad)

    def do_swap_layers(self) -> None:
        self.model[3], self.model[4] = self.model[4], self.model[3]

    def do_replace_a_buffer(self) -> None:
        self.model[1].running_mean = torch.rand(80)

    def do_register_a_buffer(self) -> None:
        self.model.register_buffer(
            f"extra{self.chance.randrange(3)}", torch.rand(self.chance.randrange(1, 5))
        )

    def do_remove_buffers(self) -> None:
        for name in [name for name in self.model._buffers if name.startswith("extra")]:
            delattr(self.model, name)

    def do_forget_the_optimizer_state(self) -> None:
        self.optimizer.state.clear()

    def do_replace_a_state(self) -> None:
        for parameter, state in list(self.optimizer.state.items())[:1]:
            self.optimizer.state[parameter] = {
                key: value.clone() * 2 if isinstance(value, torch.Tensor) else value
                for key, value in state.items()
            }

    def do_zero_the_state(self) -> None:
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def do_load_the_optimizer(self) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def do_change_the_learning_rate(self) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.5

    def do_drop_a_parameter(self) -> None:
        group = self.optimizer.param_groups[0]["params"]
        if len(group) > 2:
            self.optimizer.state.pop(group.pop(), None)

    def do_add_the_rest(self) -> None:
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if new := [p for p in self.model.parameters() if id(p) not in known]:
            self.optimizer.add_param_group({"params": new, "lr": 0.01})

    def do_note_values(self) -> None:
        self.values["list"].append(self.chance.random())

    def do_note_many_values(self) -> None:
        self.values["list"].extend([0.0] * 200)

    def do_note_a_tensor(self) -> None:
        self.values["tensor"] = torch.rand(self.chance.randrange(1, 9))

    def do_hook_the_state_dict(self) -> None:
        self.model._register_state_dict_hook(lambda *_: None)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_is_changed_a_snapshot_is_the_state_of_its_save_point_or_dropped(
    seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 80), nn.BatchNorm1d(80), nn.ReLU(), nn.Linear(80, 80), nn.Linear(80, 80)
    )
    model[3].requires_grad_(chance.random() < 0.5)
    kind: Any = chance.choice([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
    trained = [p for p in model.parameters() if p.requires_grad or chance.random() < 0.5]
    optimizer = kind(trained, lr=1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    changes = Changes(model, optimizer, chance)
    run = Run(tmp_path, changes.values, model=model, optimizer=optimizer, scheduler=scheduler)

    def one(step: int) -> None:
        early = step > 3 and chance.random() < 0.15  # a copy may be running behind this step
        if early:
            changes.one()
        train(model, optimizer)
        scheduler.step()
        if not early and chance.random() < 0.35:
            changes.one()

    run.run(STEPS, one)
    assert sorted(run.good + run.torn + run.stale) == list(range(1, STEPS + 1))
    assert len(run.good) > STEPS / 2


# --------------------------------------------------------------------------- what runs out


def test_where_no_thread_is_to_be_had_the_training_goes_on(
    slow: SlowGpu | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Thread:
        def __init__(self, **_: Any) -> None:
            pass

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(overlap.threading, "Thread", Thread)
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(7, lambda _: train(model, optimizer))
    assert sorted(run.good + run.torn) == list(range(1, 8))
    assert not run.torn or slow, (
        "a copy that is queued is waited for by the training then: the slow GPU does not have that"
    )
    run.writer.close()
