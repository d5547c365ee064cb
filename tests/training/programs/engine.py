"""A rank whose weights change behind the engine's back."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from supervisor.edge.control import Word
from supervisor.training import Session, engine
from supervisor.training.engine import ArenaWriter
from supervisor.training.state import TrainingState
from supervisor.training.world import World
from supervisor.training.writer import Written
from tests.training.programs.trainings import Plan, train


def tear(steps: int, earliest: int) -> int:
    """Train; on rank 1, change a weight behind the first save point from ``earliest`` on that is copied behind a step."""
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    torn = 0
    with Session(model=model, optimizer=optimizer) as session:
        for step in session.steps(steps):
            if session._saver._writer.is_busy and dist.get_rank() == 1 and step >= earliest and not torn:
                torn = step
                with torch.no_grad():
                    model.weight.mul_(0.5)
            optimizer.zero_grad()
            model(torch.randn(4, 300)).sum().backward()
            optimizer.step()
            if dist.get_rank() == 0:  # time for the supervisor to offer another slot
                words, deadline = session._keeper.words, time.monotonic() + 1
                while words[Word.FREE_SLOT] == session._keeper._last_offer and time.monotonic() < deadline:
                    time.sleep(0.001)
            dist.barrier()
    return torn


def save_and_load_after_an_evaluation(slot: str) -> bool:
    """A forward without a backward leaves the root of FSDP2 in one piece. Whether this rank's weights came back."""
    dist.init_process_group("gloo")
    world = World()

    def build(seed: int) -> tuple[nn.Module, TrainingState]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        fully_shard(model[0])
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        evaluate(model)
        state = TrainingState({"model": model, "optimizer": optimizer}, {}, world)
        evaluate(model)
        return model, state

    def evaluate(model: nn.Module) -> None:
        with torch.no_grad():
            model(torch.randn(4, 8))
        assert not all(isinstance(parameter, DTensor) for parameter in model.parameters()), "no test at all"

    def parts(model: nn.Module) -> list[torch.Tensor]:
        return [value.to_local().clone() for value in get_model_state_dict(model).values()]

    model, state = build(seed=1)
    outcomes: list[object] = []
    writer = ArenaWriter(world, cleans=world.rank == 0)
    writer.write(Path(slot), lambda: state.gather(1), outcomes.append)
    writer.close()
    assert isinstance(outcomes[0], Written), outcomes
    other, its_state = build(seed=2)
    its_state.load(Path(slot))
    dist.barrier()
    return all(map(torch.equal, parts(other), parts(model)))


def drafted(plan: Plan) -> dict[str, object]:
    """Train, with every layout drafted by a thread, as that of a large state is."""
    engine._LARGE = 0  # type: ignore[misc]
    return train(plan)
