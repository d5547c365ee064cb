"""The example GPT, kept by a Session, by ``dcp.async_save`` every N steps, or not at all: the script of ``goodput.py``.

The number of the last completed step of each rank, and the monotonic nanosecond in which it was completed, are in
``$BENCH/step-<rank>`` (16 bytes, mapped), its process in ``pid-<rank>``.
Rank 0 raises when there is a file ``raise``.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.gpt_ddp import GPT, batch_of, corpus

dcp: Any = torch.distributed.checkpoint
STEPS = 10_000_000
FOLDER = Path(os.environ["BENCH"])


class Saved:
    """As a user of ``dcp.async_save`` would do it: at most one save under way, the newest complete one noted in a file."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> None:
        self._model, self._optimizer, self._every = model, optimizer, every
        self._future: Any = None
        self._step = 0

    def _state(self) -> dict[str, Any]:
        model, optimizer = dcp.state_dict.get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def resume(self) -> int:
        """The step to begin at."""
        latest = FOLDER / "latest"
        if not latest.exists():
            return 0
        step = int(latest.read_text())
        state = self._state()
        dcp.load(state, checkpoint_id=FOLDER / "checkpoints" / str(step))
        dcp.state_dict.set_state_dict(
            self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return step

    def after(self, step: int) -> None:
        """A step is complete."""
        if self._future is not None and self._future.done():
            self._note()
        if step % self._every == 0:
            if self._future is not None:
                self._future.result()
                self._note()
            self._future = dcp.async_save(self._state(), checkpoint_id=FOLDER / "checkpoints" / str(step))
            self._step = step

    def _note(self) -> None:
        self._future.result()
        self._future = None
        if dist.get_rank() == 0:
            (FOLDER / "latest.tmp").write_text(str(self._step))
            os.rename(FOLDER / "latest.tmp", FOLDER / "latest")


def steps(keep: str, every: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """The numbers of the steps to make, saved on the way."""
    if keep == "session":
        from supervisor.training import Session

        with Session(model=model, optimizer=optimizer) as session:
            yield from session.steps(STEPS)
    elif keep == "dcp":
        saved = Saved(model, optimizer, every)
        for step in range(saved.resume(), STEPS):
            yield step
            saved.after(step + 1)
    else:
        yield from range(STEPS)


def counter(rank: int) -> Callable[[int], None]:
    """What notes completed steps."""
    (FOLDER / f"step-{rank}").write_bytes(bytes(16))
    (FOLDER / f"pid-{rank}").write_text(str(os.getpid()))
    with open(FOLDER / f"step-{rank}", "r+b") as file:
        words = mmap.mmap(file.fileno(), 16)

    def note(step: int) -> None:
        words[:16] = struct.pack("QQ", step, time.monotonic_ns())

    return note


def main() -> None:
    """Train for ever."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", choices=["session", "dcp", "nothing"], required=True)
    parser.add_argument("--every", type=int, default=100, help="steps between two saves with dcp")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text, rank = corpus(), dist.get_rank()
    note = counter(rank)
    for step in steps(arguments.keep, arguments.every, model, optimizer):
        inputs, targets = batch_of(text, step, 8 * dist.get_world_size(), 0)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        note(step + 1)
        if rank == 0 and (FOLDER / "raise").exists():
            (FOLDER / "raise").unlink()
            raise RuntimeError(f"at {time.time()}")


if __name__ == "__main__":
    main()
