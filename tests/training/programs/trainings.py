"""Trainings for the tests: with or without a Session, killed or not, and a digest of all that they leave behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchdata.stateful_dataloader import StatefulDataLoader

from supervisor.training import Session


@dataclass(frozen=True)
class Plan:
    """What to train, and how it is disturbed."""

    kind: str = "plain"  # plain, ddp, fsdp
    steps: int = 8
    session: bool = True
    dir: str | None = None
    every: str = "1step"
    keep: int = 1000
    workers: int = 0
    lazy: bool = True  # the iterator is made inside the first step
    persistent: bool = False
    own_generator: bool = False
    accumulate: int = 1  # backward passes a step; negative: steps an optimizer step
    norm: bool = True
    width: int = 16
    depth: int = 2
    bucket_mb: float | None = None
    ddp: tuple[tuple[str, Any], ...] = ()
    scaled_lr: bool = False
    kill_at: int | None = None  # SIGKILL itself as this step begins
    raise_at: int | None = None
    device: str = "cpu"


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4, generator=generator)


def build(plan: Plan) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(7)
    blocks: list[nn.Module] = [nn.Linear(4, plan.width)]
    for _ in range(plan.depth):
        blocks += [nn.Sequential(nn.Linear(plan.width, plan.width), nn.ReLU(), nn.Dropout(0.2))]
    if plan.norm:
        blocks.insert(1, nn.BatchNorm1d(plan.width))
    return nn.Sequential(*blocks), nn.Linear(plan.width, 1)


def wrap(plan: Plan, module: nn.Module) -> nn.Module:
    if plan.kind == "ddp":
        options = dict(plan.ddp)
        if plan.bucket_mb is not None:
            options["bucket_cap_mb"] = plan.bucket_mb
        return DistributedDataParallel(module, **options)
    if plan.kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for child in module.children():
            if not isinstance(child, nn.BatchNorm1d) and list(child.parameters()):
                fully_shard(child)
        fully_shard(module)
    return module


def train(plan: Plan) -> dict[str, Any]:
    """Train to the end; what came of it: ``digest`` of everything, ``losses`` by step."""
    if plan.kind != "plain" and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    body, head = (wrap(plan, module) for module in build(plan))
    torch.manual_seed(100 + rank)
    random.seed(200 + rank)
    np.random.seed(300 + rank)
    first = torch.optim.AdamW(body.parameters(), lr=1e-2)
    second = torch.optim.SGD(head.parameters(), lr=1e-2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(first, 3)
    generator = torch.Generator().manual_seed(5 + rank) if plan.own_generator else None
    loader = StatefulDataLoader(
        Samples(), batch_size=4, shuffle=True, num_workers=plan.workers, generator=generator,
        persistent_workers=plan.persistent,
    )  # fmt: skip
    objects = {
        "body": body,
        "head": head,
        "first": first,
        "second": second,
        "scheduler": scheduler,
        "loader": loader,
    }
    losses: dict[int, float] = {}
    with contextlib.ExitStack() as stack:
        session: Any = None
        steps: Iterator[int] = iter(range(plan.steps))
        if plan.session:
            session = stack.enter_context(
                Session(dir=plan.dir, checkpoint_every=plan.every, keep_last=plan.keep, **objects)
            )
            start = session.step
            steps = session.steps(plan.steps)
        batches = _batches(loader) if plan.lazy else _eager(loader)
        for step in steps:
            if step == plan.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == plan.raise_at:
                raise ArithmeticError(f"at step {step}")
            if plan.accumulate > 0 or step % -plan.accumulate == 0:
                first.zero_grad()
                second.zero_grad()
            loss = torch.zeros(())
            for _ in range(max(1, plan.accumulate)):
                batch = next(batches) + 0.1 * random.random() + 0.1 * float(np.random.rand())
                loss = head(body(batch + 0.1 * torch.rand(4))).pow(2).mean()
                loss.backward()
            if plan.accumulate > 0 or (step + 1) % -plan.accumulate == 0:
                first.step()
                second.step()
                scheduler.step()
            losses[step] = float(loss)
            if session is not None:
                session.log(loss=loss)
        end = session.step if session is not None else plan.steps
    return {
        "digest": digest(body, head, first, second, scheduler, loader),
        "losses": losses,
        "start": start if session is not None else 0,
        "resumed": session is not None and session.resumed,
        "step": end,
    }


def _batches(loader: Any) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


class _eager:
    """An iterator over epochs whose first is made now."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._iterator = iter(loader)

    def __next__(self) -> torch.Tensor:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._loader)
            return next(self._iterator)


def digest(*objects: Any) -> str:
    """Of every tensor and number in the objects' states, and of the random state."""
    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if hasattr(value, "to_local"):
            value = value.to_local()
        if isinstance(value, torch.Tensor):
            hasher.update(str((value.dtype, tuple(value.shape))).encode())
            hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                hasher.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for part in value:
                feed(part)
        else:
            hasher.update(repr(value).encode())

    for value in objects:
        feed(value.state_dict())
    feed(torch.get_rng_state())
    feed(random.getstate())
    state: Any = np.random.get_state()
    feed([state[0], state[1].tobytes(), *state[2:]])
    return hasher.hexdigest()[:16]
