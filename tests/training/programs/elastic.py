"""A training whose arithmetic does not depend on the number of ranks, but for rounding."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from supervisor.training import Session

BATCH = 8  # samples a step, over all ranks


def train(kind: str, steps: int, root: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Session(model=model, optimizer=optimizer, dir=root, checkpoint_every="never") as session:
        session.state.setdefault("position", 0)
        session.state.setdefault("used", [])
        for _ in session.steps(steps):
            position = session.state["position"]
            mine = range(position + rank * BATCH // world, position + (rank + 1) * BATCH // world)
            batch = torch.stack([torch.sin(torch.arange(4.0).double() * (index + 1)) for index in mine])
            optimizer.zero_grad()
            model(batch).pow(2).mean().backward()
            optimizer.step()
            session.state["position"] = position + BATCH
            session.state["used"] = [*session.state["used"], position]
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "weights": torch.cat([w.detach().flatten() for w in weights]).tolist(),
        "used": session.state["used"],
        "draw": torch.rand(1).item(),
    }


def zero(steps: int, root: str | None) -> dict[str, Any]:
    """ZeroRedundancyOptimizer: each rank has the state of some parameters only."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo")
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with Session(
        model=model, optimizer=optimizer, scheduler=scheduler, dir=root, checkpoint_every="never"
    ) as session:
        for _ in session.steps(steps):
            optimizer.zero_grad()
            model(torch.rand(2, 4)).pow(2).mean().backward()
            optimizer.step()
            scheduler.step()
    return {"weights": [p.tolist() for p in model.parameters()], "lr": optimizer.param_groups[0]["lr"]}
