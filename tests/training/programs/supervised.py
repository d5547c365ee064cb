"""What runs under the station."""

from __future__ import annotations

import resource
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from supervisor.training import Session
from supervisor.training.engine import ArenaWriter
from supervisor.training.flight import Flight


def run(
    steps: int,
    *,
    saves: Sequence[int] = (),
    raise_at: int | None = None,
    size: int = 4,
    break_at: int | None = None,
    full_on: int | None = None,
) -> Any:
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(size, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    with Session(model=model, optimizer=optimizer, dir="/nonexistent") as session:
        if full_on == dist.get_rank():  # as if its disk were full after a thousand bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        first = session.step, session.resumed, session.attempt
        for step in session.steps(steps):
            seen.append(step)
            if step == raise_at:
                raise ArithmeticError("on purpose")
            if step == break_at:
                break
            optimizer.zero_grad()
            loss = model(torch.ones(2, size)).pow(2).mean()
            loss.backward()
            optimizer.step()
            session.state["seen"] = list(seen)
            session.log(loss=loss, step=step)
            if step in saves:
                session.save()
            with session.phase("evaluate"):
                pass
    return {
        "first": first,
        "seen": seen,
        "weight": model.module.weight.detach().sum().item(),
        "state": session.state,
    }


def evaluate_behind(steps: int) -> list[bool]:
    """Enters an evaluation at the top of each step; whether the copy of the step before was under way then, and was over in it."""
    torch.manual_seed(1)
    model = torch.nn.Linear(400, 400)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fly, wait = Flight.run, Flight._wait
    is_waited_for = threading.Event()

    def late(flight: Flight) -> None:
        is_waited_for.wait()
        fly(flight)

    def waiting(flight: Flight, event: threading.Event) -> None:
        is_waited_for.set()
        wait(flight, event)
        is_waited_for.clear()

    Flight.run, Flight._wait = late, waiting  # type: ignore[method-assign]
    found = []
    with Session(model=model, optimizer=optimizer) as session:
        for _ in session.steps(steps):
            writer = session._saver._writer
            assert isinstance(writer, ArenaWriter)
            pending = writer._behind._pending
            if pending is not None:
                assert not pending.flight.is_over
                with session.phase("evaluate"):
                    found.append(pending.flight.is_over)
            optimizer.zero_grad()
            model(torch.ones(2, 400)).pow(2).mean().backward()
            optimizer.step()
    return found
