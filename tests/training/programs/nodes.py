"""Ranks on two nodes that share no storage: each writes into a slot of its own node, and loads from it again."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from supervisor.errors import CheckpointError, StorageError
from supervisor.training import drafting, engine
from supervisor.training.engine import ArenaWriter
from supervisor.training.state import TrainingState
from supervisor.training.world import World
from supervisor.training.writer import Written

State = dict[str, bytes]


def train_and_come_back(root: str, kind: str, *, drafted: bool) -> dict[str, object]:
    """Two layouts, the first in slots 0 and 1, the second in slot 0; what came back from slots 1 and 0, and what had been there."""
    rank, local = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) // 2
    node = rank // local
    os.environ.update(GROUP_RANK=str(node), GROUP_WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank % local), LOCAL_WORLD_SIZE=str(local))
    if drafted:
        engine._LARGE = 0  # type: ignore[misc]
    dist.init_process_group("gloo")
    world = World(apart=True)
    values: dict[str, object] = {}
    state, model, optimizer = training(world, values, kind, seed=1)
    writer = ArenaWriter(world, cleans=world.local_rank == 0)
    slots = [Path(root, f"node-{node}", str(slot)) for slot in range(2)]

    def outcome_of(slot: Path) -> Written | StorageError:
        outcomes: list[Written | StorageError | None] = [None]
        while outcomes[-1] is None:  # put off, on all ranks
            writer.write(slot, lambda: state.gather(3), outcomes.append, behind=drafted)
        return outcomes[-1]

    def save(slot: Path) -> None:
        outcome = outcome_of(slot)
        assert isinstance(outcome, Written), outcome

    step(model, optimizer, rank)
    with index_that_fails(on=node == 1):
        outcome = outcome_of(slots[0])
        assert isinstance(outcome, StorageError), outcome  # on all ranks
        assert f"rank {local}: OSError: [Errno 28]" in str(outcome)
    save(slots[0])
    step(model, optimizer, rank)
    save(slots[1])
    before, whole = parts_of(model, optimizer), whole_of(model)
    values["seen"] = torch.arange(rank + 2)  # something new: another layout
    step(model, optimizer, rank)
    save(slots[0])
    after = parts_of(model, optimizer)
    frozen = len(writer._rack.get(slots[0]).frozen.tensors)
    writer.close()
    state, model, optimizer = training(world, values, kind, seed=2)
    step(model, optimizer, rank)
    values.clear()
    state.load(slots[1])
    came_back = [parts_of(model, optimizer) == before and not values]
    state.load(slots[0])
    came_back.append(parts_of(model, optimizer) == after and values["seen"].tolist() == list(range(rank + 2)))  # type: ignore[attr-defined]
    dist.barrier()
    return {"came_back": came_back, "model": whole, "frozen": frozen}


@contextlib.contextmanager
def index_that_fails(*, on: bool) -> Iterator[None]:
    def put_index(directory: Path, index: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))

    real = drafting.put_index
    if on:
        drafting.put_index = put_index
    yield
    drafting.put_index = real


def load_alone(whole: str, partial: str, kind: str) -> dict[str, object]:
    """As the only rank there is, from a slot that has the files of both nodes, and from one that has those of one node."""
    state, model, _ = training(World(), {}, kind, seed=3)
    state.load(Path(whole))
    loaded = whole_of(model)
    try:
        state.load(Path(partial))
    except CheckpointError as error:
        return {"model": loaded, "refused": str(error)}
    raise AssertionError("a half was taken for the whole")


def training(
    world: World, values: dict[str, object], kind: str, seed: int
) -> tuple[TrainingState, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 5))
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    if world.size > 1 and kind == "ddp":
        model = DistributedDataParallel(model)
    elif world.size > 1:
        hybrid = kind == "hybrid"  # replicated over the nodes, sharded over the ranks of each
        shape = (2, world.size // 2) if hybrid else (world.size,)
        names = ("node", "rank") if hybrid else ("rank",)
        model = fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return TrainingState({"model": model, "optimizer": optimizer}, values, world), model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 32) + rank).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def parts_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    """What this rank holds."""
    found = [*model.state_dict().values()]
    for state in optimizer.state.values():
        found += [state[name] for name in sorted(state)]
    return [bytes_of(value._local_tensor if isinstance(value, DTensor) else value) for value in found]


def whole_of(model: nn.Module) -> State:
    """All parameters. Collective."""
    return {
        name.removeprefix("module."): bytes_of(p.full_tensor() if isinstance(p, DTensor) else p)
        for name, p in model.named_parameters()
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.detach().contiguous().numpy().tobytes()
    return data
