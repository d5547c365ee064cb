"""What changes the state behind a save point, around the optimizers: found out, dropped, said; or never copied behind a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from supervisor.training.flight import Samples
from tests.training.overlapping import AdamW, Run, held_back, net, one_thread, slow, train
from tests.training.slow_gpu import SlowGpu

__all__ = ["one_thread", "slow"]


@pytest.mark.parametrize("through_data", [True, False])
def test_weights_changed_outside_at_every_step_are_found_by_the_proof(
    through_data: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_: int) -> None:
        with torch.no_grad():
            weight = model[3].weight
            (weight.data if through_data else weight).mul_(0.99)
        train(model, optimizer)

    run.run(6, one)
    assert run.good == list(range(1, 7))
    assert run.behind == 0
    assert capsys.readouterr().err.count("outside of optimizer.step()") == 1


@pytest.mark.parametrize("through_data", [True, False])
def test_weights_changed_outside_later_tear_the_copy_and_end_it(
    through_data: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    changed = held_back(monkeypatch)

    def one(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                (model[3].weight.data if through_data else model[3].weight).mul_(0.99)
            changed.set()
        train(model, optimizer)
        if step == 4:
            changed.clear()  # the copy of step 5 begins when its weights are others

    run.run(8, one)
    assert run.torn == [5]
    assert run.good == [1, 2, 3, 4, 6, 7, 8]
    assert run.behind == 3
    assert capsys.readouterr().err.count("outside of optimizer.step()") == 1


@pytest.mark.parametrize("layers", [60, 280])
def test_weights_swapped_for_others_and_back_around_the_counters(
    layers: int, slow: SlowGpu | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As evaluations with averaged weights do; with so many tensors that not all are looked at."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 40), *(nn.Linear(40, 40) for _ in range(layers)))
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    swapped = held_back(monkeypatch)

    def one(step: int) -> None:
        if step == 5:
            own = [parameter.data.clone() for parameter in model.parameters()]
            for parameter in model.parameters():
                parameter.data.zero_()
            swapped.set()
            pending = run.writer._behind._pending
            assert pending is not None
            assert pending.flight._all_queued.wait(60)
            for parameter, data in zip(model.parameters(), own, strict=True):
                parameter.data.copy_(data)
        train(model, optimizer)
        if step == 4:
            swapped.clear()

    run.run(7, one)
    assert run.behind > 2
    assert sorted(run.good + run.torn) == list(range(1, 8))
    is_copied_at_once = slow is None and model[0].weight.device.type == "cpu"
    assert run.torn in (
        [5],
        [5] if is_copied_at_once else [],
    )  # what is queued late finds its own weights again


def test_renormalised_embeddings(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 8, max_norm=0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_: int) -> None:
        optimizer.zero_grad()
        model(torch.randint(50, (16,))).mean().backward()
        optimizer.step()

    run.run(6, one)
    assert sorted(run.good + run.torn) == list(range(1, 7))
    assert len(run.torn) <= 1


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Of this process alone."""
    kind = "cuda" if request.node.callspec.params["slow"] == "cuda" else "cpu"
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(kind, (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("how", ["itself", "its part", "data of its part"])
def test_sharded_weights_changed_outside_later(
    how: str,
    trained: bool,
    mesh: DeviceMesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each way is counted elsewhere, or nowhere."""
    if how != "data of its part":
        monkeypatch.setattr(Samples, "differ", lambda _: False)
        monkeypatch.setattr(Samples, "differ_on_gpu", lambda _: False)
    model = net()
    model[3].weight.requires_grad_(trained)
    for part in (model[0], model[3], model):
        fully_shard(part, mesh=mesh)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    run = Run(tmp_path, model=model, optimizer=optimizer)
    changed = held_back(monkeypatch)

    def one(step: int) -> None:
        if step == 5:
            weight = model[3].weight
            assert isinstance(weight, DTensor)
            with torch.no_grad():
                to_write = weight if how == "itself" else weight.to_local()
                (to_write.data if how.startswith("data") else to_write).mul_(0.99)
            changed.set()
        train(model, optimizer)
        if step == 4:
            changed.clear()  # the copy of step 5 begins when its weights are others

    run.run(8, one)
    assert run.torn == [5]
    assert run.good == [1, 2, 3, 4, 6, 7, 8]
    assert run.behind == (3 if trained else 6)


class Foreign:
    """An optimizer that torch knows nothing of."""

    def __init__(self, optimizer: Any) -> None:
        self.inner = optimizer

    def step(self) -> None:
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def test_foreign_optimizers_never_pass_the_fence(tmp_path: Path) -> None:
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(tmp_path, model=model, optimizer=inner)
    run.run(5, lambda _: train(model, Foreign(inner)))
    assert run.good == list(range(1, 6))
    assert run.behind == 0


def test_optimizers_inside_the_backward_pass(tmp_path: Path) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model, head = net(), nn.Linear(1, 1)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    optimizer = AdamW(head.parameters())
    run = Run(tmp_path, model=model, head=head, optimizer=optimizer)
    run.run(6, lambda _: train(nn.Sequential(model, head), optimizer))
    assert run.good == list(range(1, 7))


def hooked(model: nn.Module) -> None:
    def scaled(_module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
        state[f"{prefix}3.bias"] = state[f"{prefix}3.bias"] * 0 + 7

    model._register_state_dict_hook(scaled)


def replaced(optimizer: torch.optim.Optimizer) -> None:
    state = next(iter(optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].clone()


@pytest.mark.parametrize("change", ["a hook", "another tensor"])
def test_what_changes_the_state_dict_is_noticed_behind_the_step(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 5:
            hooked(model) if change == "a hook" else replaced(optimizer)

    run.run(9, one)
    assert run.stale == [6]
    assert run.good == [1, 2, 3, 4, 5, 7, 8, 9]
    assert not run.torn
    assert not capsys.readouterr().err


def test_a_slot_that_was_taken_away_is_noticed_behind_the_step(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 5:
            (tmp_path / "0" / "__0_0.distcp").unlink()

    run.run(9, one)
    assert run.stale == [6]
    assert run.good == [1, 2, 3, 4, 5, 7, 8, 9]
