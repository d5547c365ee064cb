"""Weights that are not trained: copied behind the steps in their own time, and found out when something writes them."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from supervisor.training.frozen import Frozen
from supervisor.training.slots import Slot
from tests.training.overlapping import AdamW, Run, adapted, net, one_thread, slow, train, waiting

__all__ = ["one_thread", "slow"]


def test_frozen_weights_are_copied_behind_the_step(tmp_path: Path) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(6, lambda _: train(model, optimizer))
    assert run.good == list(range(1, 7))
    assert run.behind > 0
    assert waiting(run) == []


@pytest.mark.parametrize("through_data", [True, False])
def test_averages_that_look_frozen_are_found_out_and_the_rest_flies(
    through_data: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, average=average, optimizer=optimizer)

    def one(_: int) -> None:
        with torch.no_grad():  # at the beginning of a step: behind the save point
            for held, new in zip(average.parameters(), model.parameters(), strict=True):
                (held.data if through_data else held).lerp_(new, 0.1)
        train(model, optimizer)

    run.run(8, one)
    assert run.good == list(range(1, 9))
    assert run.behind > 0
    assert len(waiting(run)) == 3 * len(list(average.parameters()))
    assert "outside of optimizer.step()" not in capsys.readouterr().err


def test_frozen_weights_counted_as_written_are_not_trusted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step in (5, 9):
            with torch.no_grad():
                model[3].weight[17, 4] += 1

    run.run(12, one)
    assert run.torn in ([], [5])  # if the copy of step 5 had not come to it
    assert sorted(run.good + run.torn) == list(range(1, 13))
    assert run.behind > 5
    assert waiting(run) == [model[3].weight.data_ptr()] * 3
    assert "outside of optimizer.step()" not in capsys.readouterr().err


@pytest.mark.parametrize("through_data", [True, False])
def test_frozen_weights_that_are_others_at_a_save_point_only(through_data: bool, tmp_path: Path) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)
    kept = model[3].weight.detach().clone()

    def one(step: int) -> None:
        weight = model[3].weight.data if through_data else model[3].weight
        with torch.no_grad():
            if step == 6:
                weight.copy_(kept)  # before the copy of step 6 has come to it, or after
        train(model, optimizer)
        with torch.no_grad():
            if step == 5:
                weight.add_(1)

    run.run(10, one)
    assert sorted(run.good + run.torn) == list(range(1, 11))
    assert set(run.torn) <= ({5, 6, 7} if through_data else {5})


def test_frozen_weights_that_are_written_one_after_the_other(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    model.requires_grad_(False)
    model[0].requires_grad_(True)
    optimizer = AdamW(model[0].parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 64)).pow(2).mean().backward()
        optimizer.step()
        if 5 <= step < 16:
            model[step - 4].weight.data.mul_(0.9)

    run.run(20, one)
    assert 1 <= len(run.torn) <= 3
    assert sorted(run.good + run.torn) == list(range(1, 21))


def test_a_slot_is_not_compared_with_itself(tmp_path: Path) -> None:
    """What was at its place before it was made anew may be the very same pages."""
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(6, lambda _: train(model, optimizer))
    assert run.good[-1] == 6
    path = tmp_path / "0"
    before = run.writer._rack.get(path)
    run.writer._rack.forget(path)
    assert run.writer._layout is not None
    anew = run.writer._rack.make(path, run.writer._layout)
    assert run.writer._frozen._before is before
    assert not run.writer._frozen.may_wait(anew)


def test_frozen_weights_written_around_the_counters_cost_one_snapshot_and_are_not_trusted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        if step in (5, 9):
            model[3].weight.data[17, 4] += 1  # one of 90,000
        train(model, optimizer)

    run.run(12, one)
    assert run.torn in ([5], [6])  # it was written before or after the copy of step 5 was over
    assert sorted(run.good + run.torn) == list(range(1, 13))
    assert run.behind > 5
    assert waiting(run) == [model[3].weight.data_ptr()] * 3
    told = capsys.readouterr().err
    assert told.count("weights that are not trained were written") == 1
    assert "outside of optimizer.step()" not in told


def test_optimizers_do_not_wait_for_frozen_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)
    stepped, copied = threading.Event(), Frozen.copy
    waited: list[bool] = []
    stepped.set()

    def late(frozen: Frozen, slot: Slot) -> str | None:
        waited.append(stepped.wait(60))
        return copied(frozen, slot)

    monkeypatch.setattr(Frozen, "copy", late)

    def one(step: int) -> None:
        train(model, optimizer)
        stepped.set()  # no step is complete before
        if step == 5:
            run.writer.flush()
            stepped.clear()

    run.run(8, one)
    assert run.good == list(range(1, 9))
    assert waited
    assert all(waited)


def test_frozen_weights_written_in_a_slot_of_another_layout(tmp_path: Path) -> None:
    model, optimizer = adapted()
    extra = nn.BatchNorm1d(8, affine=False)
    run = Run(tmp_path, model=model, optimizer=optimizer, extra=extra)

    def one(step: int) -> None:
        if step == 5:
            extra.register_buffer("late", torch.zeros(3))
        if step in (4, 6):
            model[3].weight.data.mul_(0.99)
        train(model, optimizer)

    run.run(12, one)
    assert sorted(run.good + run.torn + run.stale) == list(range(1, 13))
    assert len(run.torn) <= 1
    assert waiting(run) == [model[3].weight.data_ptr()] * 3


def test_thawed_weights(tmp_path: Path) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        if step == 5:
            model[3].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[3].parameters())})
        train(model, optimizer)

    run.run(10, one)
    assert sorted(run.good + run.stale) == list(range(1, 11))
    assert run.stale in ([], [5])  # there are more parameters when its copy is over
    assert run.behind > 3
    assert waiting(run) == []
