"""What a snapshot costs the training: ours and stock PyTorch's, side by side in one run.

A model trains under AdamW; at the end of every measured step its whole state (weights, two moments, step counters) is saved
to tmpfs. The *stall* is the time for which the training stands because of it: the call, and what is waited for before the
next ``optimizer.step()``. Stock savers get their state dict ready made, and time to finish between two snapshots, neither
of which counts; ours gathers its own. The limit is one ``memcpy`` of the same bytes into memory that was touched before.
Medians over the snapshots, worst rank.

    python benchmarks/snapshot.py [--gb 0.25] [--ranks 1] [--small] [--rounds 7]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from supervisor.training.direct import DirectReader
from supervisor.training.engine import ArenaWriter
from supervisor.training.moves import local_of
from supervisor.training.reader import read_metadata
from supervisor.training.state import TrainingState
from supervisor.training.world import World

WIDTH = 1024
dcp: Any = torch.distributed.checkpoint  # neither is typed to the end
mp: Any = torch.multiprocessing
Stalls = list[float]


class Training:
    """One rank's model, its optimizer, and a step."""

    def __init__(self, gigabytes: float, *, small: bool, batch: int) -> None:
        torch.manual_seed(0)
        if small:
            layers = [
                nn.Linear(16, 16) for _ in range(833)
            ]  # 1,666 parameters, 4,998 tensors beside step counters
        else:
            layers = [
                nn.Linear(WIDTH, WIDTH) for _ in range(max(1, round(gigabytes * 2**30 / 12 / WIDTH**2)))
            ]
        self.inputs = torch.randn(batch, layers[0].in_features)
        self.model = nn.Sequential(*layers)
        if dist.get_world_size() > 1:
            from torch.distributed.fsdp import fully_shard

            for layer in self.model if not small else []:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
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


def timed(action: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def ours(training: Training, root: Path, rounds: int, *, behind: bool) -> tuple[Stalls, Stalls, list[float]]:
    """Stalls, times of whole steps, and what the first three snapshots cost."""
    world = World()
    state = TrainingState({"model": training.model, "optimizer": training.optimizer}, {}, world)
    writer = ArenaWriter(
        world, cleans=world.rank == 0, optimizers=state.optimizers, completed=lambda: completed
    )
    fence = [0.0]
    waiting = writer._at_fence

    def at_fence() -> None:
        fence[0] += timed(waiting)

    if writer._fence is not None:
        writer._fence._wait = at_fence
    stalls: Stalls = []
    steps: Stalls = []
    first: Stalls = []
    completed = 0
    for number in range(5 + rounds):
        fence[0] = 0.0
        begun = time.perf_counter()
        training.step()
        completed = number + 1
        writer.poll()
        if number > 5:
            stalls[-1] += fence[0]  # of the snapshot before
        slot = root / str(number % 3)
        call = timed(lambda: writer.write(slot, lambda: state.gather(1), _check, behind=behind))  # noqa: B023
        if number >= 5:
            stalls.append(call)
            steps.append(time.perf_counter() - begun)
        elif number < 3:
            first.append(call)
    writer.close()
    return stalls[:-1] if behind else stalls, steps, first


def _check(outcome: object) -> None:
    if isinstance(outcome, Exception):
        raise outcome


def stock(training: Training, rounds: int, save: Callable[[dict[str, Any]], Any]) -> Stalls:
    """Stalls of a saver that returns None, or what is to be waited for: (before the optimizer, before the next save)."""
    state = training.state()
    stalls = []
    for number in range(2 + rounds):
        training.step()
        pending: Any = None
        started = time.perf_counter()
        pending = save(state)
        stall = time.perf_counter() - started
        training.gradients()
        if pending is not None:
            staged = getattr(pending, "staging_completion", None)
            stall += timed(staged.result) if staged is not None else 0.0
            getattr(pending, "upload_completion", pending).result()
        if number >= 2:
            stalls.append(stall)
    return stalls


def memcpy(training: Training, rounds: int) -> tuple[Stalls, int]:
    """One copy of every tensor into memory that was touched before."""
    state = list(training.model.parameters())
    tensors = [local_of(p).detach() for p in state]
    tensors += [local_of(v) for s in training.optimizer.state.values() for v in s.values()]
    pairs = [(t.clone(), t) for t in tensors]
    moves = [(a.data_ptr(), b.data_ptr(), b.numel() * b.element_size()) for a, b in pairs]
    return [timed(lambda: [ctypes.memmove(*move) for move in moves]) for _ in range(rounds)], sum(
        m[2] for m in moves
    )


def restore(training: Training, root: Path, rounds: int) -> dict[str, Stalls]:
    """Loading the newest snapshot into the training's own tensors."""
    state = TrainingState({"model": training.model, "optimizer": training.optimizer}, {}, World())
    items = state.gather(1)
    targets = {k: v.detach() for k, v in items.values.items() if isinstance(v, torch.Tensor)}
    slot = root / "0"

    def load(reader: Any) -> None:
        dcp.load(dict(targets), storage_reader=reader, no_dist=True)

    return {
        "restore, ours": [
            timed(lambda: load(DirectReader(slot, read_metadata(slot)))) for _ in range(rounds)
        ],
        "restore, dcp.load": [timed(lambda: load(dcp.FileSystemReader(slot))) for _ in range(rounds)],
    }


def measure(rank: int, options: argparse.Namespace, port: int, root: Path, results: Any) -> None:
    """Everything, on one rank."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(options.ranks)
    )
    dist.init_process_group("gloo")
    training = Training(options.gb, small=options.small, batch=options.batch)
    rounds = options.rounds
    found: dict[str, Stalls] = {}
    found["memcpy, touched memory"], size = memcpy(training, rounds)
    found["(a step without)"] = [timed(training.step) for _ in range(rounds)]
    found["ours, behind the step"], steps, first = ours(training, root / "behind", rounds, behind=True)
    found["(a step with ours behind it)"] = steps
    found["(ours, the first: laid out)"], found["(ours, 2nd and 3rd slot)"] = first[:1], first[1:]
    found["ours, at once"], _, _ = ours(training, root / "once", rounds, behind=False)
    found |= {f"({name})": values for name, values in restore(training, root / "once", rounds).items()}
    shutil.rmtree(root / "behind", ignore_errors=True)
    file, folder = root / f"rank-{rank}.pt", root / "stock"
    found["torch.save"] = stock(training, rounds, lambda state: torch.save(state, file))
    found["dcp.save"] = stock(training, rounds, lambda state: dcp.save(state, checkpoint_id=folder) and None)
    group = dist.new_group(backend="gloo")
    kinds = {"thread": AsyncCheckpointerType.THREAD, "process": AsyncCheckpointerType.PROCESS}
    for name, kind in kinds.items():
        found[f"dcp.async_save, {name}"] = stock(
            training,
            rounds,
            lambda state: dcp.async_save(
                state,
                checkpoint_id=folder,
                process_group=group,
                async_checkpointer_type=kind,  # noqa: B023
            ),
        )
    stager = DefaultStager(StagingOptions(False, True, False, False))  # shared memory, kept between saves
    found["dcp.async_save, process, shared memory"] = stock(
        training,
        rounds,
        lambda state: dcp.async_save(
            state, checkpoint_id=folder, process_group=group, async_stager=stager,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        ),
    )  # fmt: skip
    results.put((rank, size, found))
    dist.barrier()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, default=0.25, help="state of all ranks together")
    parser.add_argument("--ranks", type=int, default=1, help="1: a plain module; more: FSDP2 over gloo")
    parser.add_argument("--small", action="store_true", help="5,000 small tensors instead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    root = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="everstep-benchmark-"))
    try:
        spawned = mp.spawn(measure, (options, port, root, results), options.ranks, join=False)
        while not spawned.join(timeout=1):
            pass
        answers = [results.get() for _ in range(options.ranks)]
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(root)
    report(options, answers)


def report(options: argparse.Namespace, answers: list[tuple[int, int, dict[str, Stalls]]]) -> None:
    """One table."""
    size = sum(size for _, size, _ in answers) / 2**30
    what = "5,000 small tensors" if options.small else f"{size:.2f} GB of state"
    print(
        f"{what}, {options.ranks} rank(s), {'FSDP2' if options.ranks > 1 else 'plain'}; torch {torch.__version__}, "
    )
    print(f"{os.cpu_count()} cores, {platform.machine()}, median of {options.rounds}, worst rank, tmpfs\n")
    worst: dict[str, Stalls] = {}
    for name in answers[0][2]:
        worst[name] = max((found[name] for _, _, found in answers), key=statistics.median)
    best = statistics.median(worst["ours, behind the step"])
    print(f"{'':42}{'stall, ms':>10}{'min':>9}{'max':>9}{'ours is':>12}")
    for name, values in worst.items():
        middle = statistics.median(values)
        ratio = "" if name.startswith(("(", "ours, behind")) else f"{middle / best:.0f}× less"
        print(f"{name:42}{middle * 1e3:10.2f}{min(values) * 1e3:9.2f}{max(values) * 1e3:9.2f}{ratio:>12}")


if __name__ == "__main__":
    main()
