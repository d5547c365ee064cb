"""The training that the benchmarks take snapshots of, and our engine at work on it."""

from __future__ import annotations

import ctypes
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from supervisor.training.engine import ArenaWriter
from supervisor.training.gradients import Gradients
from supervisor.training.items import Items
from supervisor.training.moves import local_of
from supervisor.training.reader import Stored
from supervisor.training.state import TrainingState
from supervisor.training.world import World

__all__ = [
    "Found",
    "Training",
    "World",
    "copied",
    "free_port",
    "in_turn",
    "ours",
    "restored",
    "timed",
    "together",
]

WIDTH = 1024
SMALL = 833  # layers: 1,666 parameters, 4,998 tensors beside step counters
Found = dict[str, list[float]]
Step = Callable[[bool], tuple[float, float] | None]
_BLOCK = 2  # steps in a row that count
dcp: Any = torch.distributed.checkpoint


class Training:
    """One rank's model, its optimizer, and a step."""

    def __init__(
        self, gigabytes: float, *, small: bool, frozen: bool = False, batch: int = 256, layers: int = SMALL
    ) -> None:
        torch.manual_seed(0)
        width = 16 if small else WIDTH
        each = 4 if frozen else 12  # bytes of state for each parameter
        count = layers if small else max(1, round(gigabytes * 2**30 / each / WIDTH**2))
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))
        if frozen:  # all but one, as under an adapter
            for layer in list(self.model)[:-1]:
                layer.requires_grad_(False)
        self.inputs = torch.randn(batch, width)
        if dist.get_world_size() > 1 and not small:
            from torch.distributed.fsdp import fully_shard

            for layer in self.model:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.step()

    def gradients(self) -> None:
        """Forward and backward."""
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()

    def step(self) -> None:
        """A whole step."""
        self.gradients()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """As stock DCP has it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def together() -> None:
    """Wait for all ranks: what one waits for another because it was later in its step is no cost of a snapshot."""
    if dist.get_world_size() > 1:
        dist.barrier()


def timed(action: Callable[[], object]) -> float:
    """How long it takes, in seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _state_of(training: Training, world: World) -> TrainingState:
    return TrainingState({"model": training.model, "optimizer": training.optimizer}, {}, world)


@dataclass(frozen=True)
class _Taken:
    """A step. All in seconds: the call that saved, waiting for the save before, the whole of it, its CPU."""

    saves: bool
    call: float
    waited: float
    seconds: float
    cpu: float


def in_turn(step: Step, rounds: int, *, warm_up: int) -> Found:
    """Blocks of steps with a save at the end of each and blocks without any, in turn, as a machine gets faster and slower.

    ``step`` takes one, saves at its end if told to, and returns the seconds that this call took and those for which its
    optimizer waited for the save before; or None where it does not count. What follows a step of the other kind is left
    out. Returns *stall*, *step*, *cpu* (seconds, of steps with saves) and *plain* and *plain cpu* (of those without).
    """
    plan = [True] * warm_up + ([True] * (1 + _BLOCK) + [False] * (1 + _BLOCK)) * -(-rounds // _BLOCK)
    taken: list[_Taken] = []
    while len(taken) < len(plan):
        begun, cpu = time.perf_counter(), time.process_time()
        saves = plan[len(taken)]
        if (took := step(saves)) is not None:
            taken.append(_Taken(saves, *took, time.perf_counter() - begun, time.process_time() - cpu))
    found: Found = {"stall": [], "step": [], "cpu": [], "plain": [], "plain cpu": []}
    del taken[:warm_up]
    for before, this, after in zip(taken, taken[1:], taken[2:] + taken[-1:], strict=False):
        if this.saves != before.saves:
            continue
        if this.saves:
            found["stall"].append(this.call + after.waited)
        found["step" if this.saves else "plain"].append(this.seconds)
        found["cpu" if this.saves else "plain cpu"].append(this.cpu)
    return found


def ours(
    training: Training, world: World, root: Path, rounds: int, *, behind: bool
) -> tuple[Found, list[float]]:
    """What ``in_turn`` finds; and the stall of the first snapshot."""
    state = _state_of(training, world)
    gradients = Gradients(state.optimizers, state.modules)
    completed = 0

    def gather() -> Items:
        return state.gather_hastily(completed)

    writer = ArenaWriter(
        world,
        cleans=world.rank == 0,
        optimizers=state.optimizers,
        completed=lambda: completed,
        slots=[root / str(slot) for slot in range(3)],
    )
    fence = [0.0]
    waiting = writer._behind._at_fence

    def at_fence() -> None:
        fence[0] += timed(waiting)

    if writer._behind._fence is not None:
        writer._behind._fence._wait = at_fence
    first: list[float] = []
    outcomes: list[object] = []
    number = 0

    def save_point(slot: Path) -> None:  # as a Session's
        pending = gradients.pending()
        asked = writer.ask(gather, behind=behind)
        *_, asked = world.agreed(completed, [bool(pending), 1, 0, asked])
        writer.write(slot, gather, outcomes.append, behind=behind, agreed=asked)

    def step(saves: bool) -> tuple[float, float] | None:
        nonlocal completed, number
        fence[0] = 0.0
        training.step()
        completed += 1
        writer.poll()
        outcomes.clear()
        together()
        if not saves:
            return 0.0, fence[0]
        call = timed(lambda: save_point(root / str(number % 3)))
        if any(isinstance(outcome, Exception) for outcome in outcomes):
            raise RuntimeError(str(outcomes))
        if not first:
            first.append(call)
        if None in outcomes:  # the files are being made
            return None
        number += 1
        return call, fence[0]

    found = in_turn(step, rounds, warm_up=5)
    writer.close()
    gradients.close()
    return found, first


def copied(training: Training, rounds: int) -> list[float]:
    """One copy of every tensor into memory that was touched before."""
    tensors = [local_of(p).detach() for p in training.model.parameters()]
    tensors += [local_of(v) for s in training.optimizer.state.values() for v in s.values()]
    pairs = [(t.clone(), t) for t in tensors]
    moves = [(a.data_ptr(), b.data_ptr(), b.numel() * b.element_size()) for a, b in pairs]
    return _in_rounds(lambda: [ctypes.memmove(*move) for move in moves], rounds)


def _in_rounds(action: Callable[[], object], rounds: int) -> list[float]:
    """How long it takes, all ranks at the same time, after a first one that does not count."""
    found = []
    for _ in range(1 + rounds):
        together()
        found.append(timed(action))
    return found[1:]


def restored(training: Training, world: World, slot: Path, rounds: int) -> Found:
    """Loading a snapshot into the training's own tensors."""
    items = _state_of(training, world).gather(1).whole()
    targets = {k: v.detach() for k, v in items.values.items() if isinstance(v, torch.Tensor)}

    def stock() -> None:
        dcp.load(dict(targets), storage_reader=dcp.FileSystemReader(slot), no_dist=True)

    def straight() -> None:
        Stored(slot, world.rank).load(targets)

    return {
        "restore, ours": _in_rounds(straight, rounds),
        "restore, dcp.load": _in_rounds(stock, rounds),
    }
