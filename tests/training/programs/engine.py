"""A rank whose weights change behind the engine's back."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import nn

from supervisor.edge.control import Word
from supervisor.training import Session, engine
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
                while words[Word.FREE_SLOT] == session._keeper._last_slot and time.monotonic() < deadline:
                    time.sleep(0.001)
            dist.barrier()
    return torn


def drafted(plan: Plan) -> dict[str, object]:
    """Train, with every layout drafted by a thread, as that of a large state is."""
    engine._LARGE = 0  # type: ignore[misc]
    return train(plan)
