"""Copies behind the next step: every snapshot is, bit for bit, the state at its save point; or it is dropped, and that said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from supervisor.training import engine
from tests.training.overlapping import WIDTH, AdamW, Run, net, one_thread, slow, train
from tests.training.slow_gpu import SlowGpu

__all__ = ["one_thread", "slow"]


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("kind", [AdamW, torch.optim.SGD])
def test_optimizers(kind: Any, options: dict[str, bool], slow: SlowGpu | None, tmp_path: Path) -> None:
    model = net()
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-2, **extra, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    run = Run(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    run.run(8, lambda _: (train(model, optimizer, times=2), scheduler.step()))
    assert run.good == list(range(1, 9))
    assert run.behind == 6  # but the one that was laid out, and the one that was proven
    assert slow is None or slow.copied >= 6


def test_another_default_device(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_step: int) -> None:
        with torch.device("cpu"):
            train(model, optimizer)

    with torch.device("meta"):
        run.run(8, one)
    assert run.good == list(range(1, 9))
    assert run.behind


def test_several_optimizers(tmp_path: Path) -> None:
    body, head = net(), nn.Linear(1, 1)
    first, second = AdamW(body.parameters()), torch.optim.SGD(head.parameters(), lr=0.1)
    run = Run(tmp_path, body=body, head=head, first=first, second=second)
    run.run(8, lambda _: train(nn.Sequential(body, head), second, first))
    assert run.good == list(range(1, 9))
    assert run.behind == 6
    assert run.hasty == 5  # once all three slots are laid out


def test_one_that_does_not_step_each_time(tmp_path: Path) -> None:
    body, head = net(), nn.Linear(1, 1)
    first, second = AdamW(body.parameters()), torch.optim.SGD(head.parameters(), lr=0.1)
    run = Run(tmp_path, body=body, head=head, first=first, second=second)
    run.run(9, lambda step: train(nn.Sequential(body, head), *([first, second] if step % 2 else [first])))
    assert run.good == list(range(1, 10))
    assert 0 < run.behind < 5


def test_steps_without_an_optimizer_step(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        model(torch.randn(16, 8)).pow(2).mean().backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    run.run(12, one)
    assert run.good == list(range(1, 13))
    assert run.behind > 0


def test_averaged_weights(tmp_path: Path) -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, average=average, optimizer=optimizer)

    def one(_: int) -> None:
        average.update_parameters(model)  # also at the beginning of a step: behind the save point
        train(model, optimizer)

    run.run(8, one)
    assert run.good == list(range(1, 9))
    assert run.behind > 0


def test_nothing_is_a_number(tmp_path: Path) -> None:
    model = net()
    for name, dtype in {
        "real": torch.float32,
        "wide": torch.complex128,
        "conjugate": torch.complex64,
    }.items():
        value = torch.full((), torch.nan, dtype=dtype)
        model.register_buffer(name, value.conj() if name == "conjugate" else value)
    optimizer = AdamW(model.parameters())
    model[3].weight.data = model[3].weight.data.t().contiguous().t()  # it lies the other way round
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_: int) -> None:
        train(model, optimizer)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)

    run.run(6, one)
    assert run.good == list(range(1, 7))
    assert run.behind > 0


def test_sparse_buffers_beside_weights_that_fly(tmp_path: Path) -> None:
    model = net()
    model.register_buffer("coo", torch.eye(3).to_sparse())
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        model.coo = model.coo * 2
        found = _load_state_dict_from_keys(checkpoint_id=tmp_path / str(step % 3)) if step else None
        if found is not None:
            (kept,) = found["model"]["coo"].values()
            assert torch.equal(kept.to_dense() * 2, model.coo.to_dense())

    run.run(7, one)
    assert run.good == list(range(1, 8))
    assert run.behind > 2


def test_large_files_are_made_behind_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_LARGE", 0)
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    while len(run.good) < 6 and run.step < 1000:
        run.run(1, lambda _: train(model, optimizer))
    assert run.put_off[0] == 1
    assert sorted(run.good + run.put_off) == list(range(1, run.step + 1))
    assert run.behind > 0


def test_a_save_that_was_asked_for_does_not_wait_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_LARGE", 0)
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(1, lambda _: train(model, optimizer))
    assert run.put_off == [1]
    run.save(behind=False)
    assert run.good == [1]


def test_a_scaler_that_skips_steps(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    run = Run(tmp_path, model=model, optimizer=optimizer, scaler=scaler)

    def one(step: int) -> None:
        optimizer.zero_grad()
        loss = scaler.scale(model(torch.randn(16, 8)).pow(2).mean())
        (loss * float("inf") if step % 3 == 2 else loss).backward()
        scaler.step(optimizer)
        scaler.update()

    run.run(9, one)
    assert run.good == list(range(1, 10))
    assert run.behind > 0


def test_lbfgs(tmp_path: Path) -> None:
    model = nn.Linear(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    run = Run(tmp_path, model=model, optimizer=optimizer)
    data = torch.randn(16, 8)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(data).sub(1).pow(2).mean()
        loss.backward()
        return loss

    run.run(6, lambda _: optimizer.step(closure))
    assert run.good == list(range(1, 7))


def test_parameters_added_and_moved(tmp_path: Path) -> None:
    model, late = net(), nn.Linear(WIDTH, WIDTH)
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, late=late, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 4:
            optimizer.add_param_group({"params": list(late.parameters())})
        if step == 7:
            model[3].weight.data = model[3].weight.data.clone()
        if step == 9:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    run.run(12, one)
    # a tensor put elsewhere is noticed too late once, and from then on at once
    assert run.stale == [8]
    assert run.good == [step for step in range(1, 13) if step not in run.stale]
    assert run.behind > 5


def test_compiled_steps(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(tmp_path, model=model, optimizer=optimizer)

    @torch.compile(backend="eager")
    def whole(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()

    run.run(6, lambda _: whole(torch.randn(16, 8)))
    assert run.good == list(range(1, 7))
