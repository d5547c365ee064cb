"""A stock DCP checkpoint whose tensors are sharded in every way over two ranks, and what a whole one would hold."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from supervisor.training import Session
from supervisor.training.direct import DirectReader
from supervisor.training.reader import Stored, read_metadata

PLACEMENTS = {
    "rows": Shard(0),
    "columns": Shard(1),
    "middle": Shard(1),
    "uneven": Shard(0),
    "copies": Replicate(),
}


def whole(seed: int = 0) -> dict[str, Tensor]:
    """The tensors in one piece."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"rows": (64, 5), "columns": (6, 40), "middle": (1, 8, 3), "uneven": (7, 3), "copies": (33,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(directory: Path, seed: int = 0) -> None:
    """On each of two ranks."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {
        name: distribute_tensor(value, mesh, [PLACEMENTS[name]]) for name, value in whole(seed).items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": tensors}, checkpoint_id=directory)
    dist.barrier()
    dist.destroy_process_group()


def load(directory: Path) -> list[str]:
    """On each rank, into shards of these ranks; what was not read as it is stored."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = {
        f"model.{name}": distribute_tensor(value, mesh, [PLACEMENTS[name]]) for name, value in whole().items()
    }
    targets = {key: torch.zeros_like(value) for key, value in expected.items()}
    read = DirectReader(directory, read_metadata(directory)).read_whole(targets)
    rest = sorted(targets.keys() - read)
    Stored(directory, dist.get_rank()).load({key: targets[key] for key in rest})
    for key, target in targets.items():
        assert torch.equal(target.to_local(), expected[key].to_local()), key
    dist.barrier()
    dist.destroy_process_group()
    return rest


def train_replicated(directory: Path) -> int:
    """One step of DDP on each rank, saved by a Session in library mode; the bytes of the weights and AdamW's state."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(512, 512))
    optimizer = torch.optim.AdamW(model.parameters())
    with Session(dir=directory, model=model, optimizer=optimizer) as session:
        for _ in session.steps(1):
            model(torch.ones(1, 512)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    dist.barrier()
    dist.destroy_process_group()
    return 3 * sum(parameter.nbytes for parameter in model.parameters())
