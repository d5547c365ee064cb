"""Steps counted by hand: ``begin``, ``advance``, ``finish`` do what the turns of ``steps()`` do."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from supervisor.checkpoint import catalog
from supervisor.errors import UsageError
from supervisor.training import Session


def training() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())

    def train_step() -> None:
        loss = model(torch.randn(2, 3)).sum() * random.random()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return model, optimizer, train_step


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def steps_in(root: Path) -> list[int]:
    return sorted(record.step for record in catalog.list_checkpoints(root / "checkpoints"))


def test_it_resumes_to_the_same_bits_as_a_loop_without_a_session(tmp_path: Path) -> None:
    model, _, train_step = training()
    for _ in range(9):
        train_step()
    undisturbed = weights(model)

    for until in (4, 9):
        model, optimizer, train_step = training()
        with Session(dir=tmp_path, checkpoint_every="2steps", model=model, optimizer=optimizer) as session:
            assert session.resumed is (until == 9)
            assert session.begin(9)
            while session.step < until:
                train_step()
                going_on = session.advance()
            assert going_on is (until < 9)
    assert all(map(torch.equal, weights(model), undisturbed))
    assert steps_in(tmp_path)[-1] == 9


def test_a_step_that_was_begun_and_not_ended_is_not_counted(tmp_path: Path) -> None:
    with Session(dir=tmp_path, checkpoint_every="1steps") as session:
        session.begin()
        for _ in range(3):
            assert session.advance()
    assert session.step == 3
    assert steps_in(tmp_path)[-1] == 3


@pytest.mark.parametrize("total", [None, 10, 3])
def test_finish_saves_the_steps_completed_so_far(tmp_path: Path, total: int | None) -> None:
    with Session(dir=tmp_path, checkpoint_every="never") as session:
        session.begin(total)
        for done in range(1, 4):
            session.state["done"] = done
            session.advance()
        session.finish()
        session.finish()
    assert steps_in(tmp_path) == [3]
    with Session(dir=tmp_path) as session:
        assert session.step == session.state["done"] == 3
        assert not session.begin(3)
        assert session.begin(4)
        assert not session.advance()


def test_what_is_called_at_the_wrong_time_is_said(tmp_path: Path) -> None:
    session = Session(dir=tmp_path)
    for call in (session.begin, session.finish):
        with pytest.raises(UsageError, match="for the inside of"):
            call()
    with session:
        with pytest.raises(UsageError, match=r"begin\(\) has begun"):
            session.advance()
        session.begin(3)
        with pytest.raises(UsageError, match="running already"):
            session.begin(3)
