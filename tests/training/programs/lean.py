"""FSDP2 ranks that resume from a checkpoint of which only what they ask for is there, as on one of several nodes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from supervisor.checkpoint.pieces import Range
from supervisor.training.engine import ArenaWriter
from supervisor.training.reader import read_metadata
from supervisor.training.state import TrainingState
from supervisor.training.supply import Supply
from supervisor.training.world import World
from supervisor.training.writer import Written

WIDTH = 1536


def _training(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters())


def save(folder: Path) -> None:
    """A snapshot of one step, as a supervised training makes it."""
    dist.init_process_group("gloo")
    world = World()
    model, optimizer = _training(0)
    model(torch.randn(4, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = TrainingState({"model": model, "optimizer": optimizer}, {"notes": "x" * 1000}, world)
    outcomes: list[object] = []
    writer = ArenaWriter(world, cleans=world.rank == 0)
    writer.write(folder, lambda: state.gather(1), outcomes.append)
    writer.close()
    assert isinstance(outcomes[0], Written), outcomes
    dist.barrier()
    dist.destroy_process_group()


def load(checkpoint: Path, folder: Path, *, strict: bool) -> dict[str, float]:
    """Load what lies in ``checkpoint`` twice: as it is, and by way of a directory where what is not asked for is missing.

    ``strict``: a byte that nobody asked for is not there, else squares of 8 MiB are brought, as the supervisor does. Returns
    the bytes asked for, the requests, and the bytes of all files.
    """
    dist.init_process_group("gloo")
    place = folder / str(dist.get_rank())
    place.mkdir(parents=True)
    total, asked = 0, {"bytes": 0, "requests": 0}
    for path in checkpoint.iterdir():
        total += path.stat().st_size
        data = path.read_bytes() if path.name == ".metadata" else b""
        (place / path.name).write_bytes(data)
        os.truncate(place / path.name, path.stat().st_size)
    names = {info.relative_path for info in read_metadata(checkpoint).storage_data.values()}

    def need(wanted: Mapping[str, list[Range]]) -> None:
        asked["requests"] += 1
        for name, ranges in wanted.items():
            assert name in names
            with (checkpoint / name).open("rb") as source, (place / name).open("r+b") as target:
                for start, length in ranges:
                    source.seek(start)
                    target.seek(start)
                    target.write(source.read(length))
                    asked["bytes"] += length

    if strict:
        Supply.grid = 1
    states = []
    for where, whom in ((checkpoint, None), (place, need)):
        model, optimizer = _training(1)
        values: dict[str, Any] = {}
        training = TrainingState({"model": model, "optimizer": optimizer}, values, World())
        assert training.load(where, whom) == 1
        training.restore_rng()
        tensors = [*model.parameters(), *model.buffers()]
        for state in optimizer.state.values():
            tensors += state.values()
        states.append(([_local(tensor) for tensor in tensors], values, torch.rand(3)))
    (one, values, draw), (other, others, drawn) = states
    assert len(one) == len(other) > 20
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert values == others == {"notes": "x" * 1000}
    assert torch.equal(draw, drawn)
    dist.barrier()
    dist.destroy_process_group()
    return {**asked, "total": total}


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
