"""Snapshots at every step of a training on a GPU: what they cost it, beside none, copies at once, and stock PyTorch's.

Steps are not waited for one by one, as in a training they are not: the time of all of them together counts, up to the point
where the device has done them. The *call* is what the training's thread spends at a save point. After
the run the last snapshot is read back and compared with the weights.

    python benchmarks/gpu.py [--gb 1] [--steps 30] [--batch 8192] [--device cuda]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint

from benchmarks.snapshot import scratch
from benchmarks.training import Training, World, free_port, timed
from supervisor.training.engine import ArenaWriter
from supervisor.training.items import Items
from supervisor.training.state import TrainingState

dcp: Any = torch.distributed.checkpoint
Save = Callable[[int], object]
WARM_UP = 8


def synchronize() -> None:
    """Until the device has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed_steps(training: Training, steps: int, save: Save) -> tuple[float, float]:
    """Seconds of a step, and of a call, at the median."""
    calls = []
    for number in range(1, 1 + WARM_UP + steps):
        if number == 1 + WARM_UP:
            synchronize()
            begun = time.perf_counter()
        training.step()
        calls.append(timed(functools.partial(save, number)))
    synchronize()
    return (time.perf_counter() - begun) / steps, statistics.median(calls[WARM_UP:])


class Ours:
    """A save point after every step."""

    def __init__(self, training: Training, root: Path, *, behind: bool) -> None:
        self._root, self._behind = root, behind
        self._state = TrainingState({"model": training.model, "optimizer": training.optimizer}, {}, World())
        self._completed = 0
        self.outcomes: list[object] = []
        self.writer = ArenaWriter(
            World(),
            cleans=True,
            optimizers=self._state.optimizers,
            completed=lambda: self._completed,
            slots=[root / str(slot) for slot in range(3)],
        )

    def save(self, step: int) -> None:
        """The save point."""
        self._completed = step
        self.writer.poll()
        slot = self._root / str(step % 3)
        asked = self.writer.ask(self._gather, behind=self._behind)
        self.writer.write(slot, self._gather, self.outcomes.append, behind=self._behind, agreed=asked)

    def _gather(self) -> Items:
        return self._state.gather_hastily(self._completed)

    def check(self, training: Training, step: int) -> bool:
        """Whether the last snapshot is the state of now, and none was dropped."""
        self.writer.flush()
        bad = [outcome for outcome in self.outcomes if isinstance(outcome, Exception)]
        expected = {f"model.{name}": value.cpu() for name, value in training.model.state_dict().items()}
        found = {name: torch.empty_like(value) for name, value in expected.items()}
        dcp.load(found, checkpoint_id=self._root / str(step % 3), no_dist=True)
        same = all(torch.equal(found[name], value) for name, value in expected.items())
        self.writer.close()
        print(
            f"    the last one is {'' if same else 'NOT '}what it should be, {len(bad)} dropped {bad[:1] or ''}"
        )
        return same and not bad


def main() -> None:
    """Measure and print. Exit code 1 when a snapshot is wrong, or was dropped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, default=1, help="state")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    dist.init_process_group("gloo")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"torch {torch.__version__}, {name}: {options.gb:g} GB of state")
    print(f"{'':36}{'step, ms':>10}{'times':>8}{'call, ms':>10}")
    plain, is_right = 0.0, True

    def row(text: str, save: Save) -> None:
        nonlocal plain
        step, call = timed_steps(training, options.steps, save)
        plain = plain or step
        print(f"{text:36}{step * 1e3:10.2f}{step / plain:8.2f}{call * 1e3:10.2f}", flush=True)

    with scratch() as root, device:
        training = Training(options.gb, small=False, batch=options.batch)
        row("no snapshots", lambda _step: None)
        for text, behind in (("ours, behind the step", True), ("ours, at once", False)):
            one = Ours(training, root / text.replace(" ", "-"), behind=behind)
            row(text, one.save)
            is_right = one.check(training, WARM_UP + options.steps) and is_right
        row("dcp.save", lambda _step: dcp.save(training.state(), checkpoint_id=root / "stock"))
        pending: list[Any] = []

        def asynchronous(_step: int) -> None:
            while pending:
                pending.pop().result()
            pending.append(dcp.async_save(training.state(), checkpoint_id=root / "asynchronous"))

        row("dcp.async_save", asynchronous)
        while pending:
            pending.pop().result()
        row("no snapshots, again", lambda _step: None)
    dist.destroy_process_group()
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
