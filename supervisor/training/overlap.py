"""Copying behind the next step: when that is safe, and how it is noticed when it was not.

Parameters and optimizer state change in ``optimizer.step()`` and nowhere else. So a copy of them that starts at a save
point may run on behind the next forward and backward, until any optimizer is about to step: torch calls a
global hook there, the *fence*, and the fence waits for the copy. Weights that are not trained are copied after that
(``frozen``): under an adapter they are nearly all there is. Buffers, schedulers, averages of weights, plain values and
random state keep no such rule; they are copied while the training stands at the save point.

The rule has blind spots: optimizers that do not derive from torch's, steps captured as one graph, weights written
through ``.data`` between the save point and the fence, forwards that renormalise weights. Hence:

- *Only what is known to pass the fence.* A copy is put behind a step only if every optimizer of the Session stepped in the
  step before and came through the fence.
- *Proof first.* The first time that holds, the snapshot is still copied at once, and at the next fence the tensors are
  compared, bit for bit, with what was copied. If they differ, something changes them outside the fence, and this rank
  copies at once for good.
- *Samples.* A few bytes of each weight, and of some of the optimizers' tensors, are noted at the save point, and must be the
  same in what was copied. (Of more than 512 weights, or 32 on a GPU, every second one, or third, all in turn.) That finds who swaps the
  weights for others around the counters, and swaps them back before the fence, though it be seldom.
- *Versions.* Every in-place operation on a tensor counts up ``tensor._version`` (but neither fused optimizers nor writes
  through ``.data`` do: hence the fence). The versions at the save point are compared when the copy is over (``flight``). If
  they differ the snapshot is torn: it is discarded, that is said, and this rank copies at once for good. What it wrote has no
  ``slot.json`` and is never taken for a snapshot.
- *Asked.* ``session.phase(…)`` waits for the copy, as an evaluation with other weights may follow.

None of this needs another rank: who copies when is each rank's own affair.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from supervisor.training import gpu
from supervisor.training.moves import local_of


class Fence:
    """Comes before every ``optimizer.step()`` of this process, and knows which optimizers came by in which step.

    ``completed`` tells how many steps are complete, ``wait`` is what is done at the fence.
    """

    def __init__(self, wait: Callable[[], None], completed: Callable[[], int]) -> None:
        self._wait = wait
        self._completed = completed
        self._passed: dict[int, int] = {}  # by id: steps that were complete when it came by last
        _hide_from_compiler(Fence._before)
        self._handle = register_optimizer_step_pre_hook(self._before)

    def _before(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._passed[id(optimizer)] = self._completed()
        self._wait()

    def all_passed(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether each of them came by in the step that was completed last."""
        last = self._completed() - 1
        return all(self._passed.get(id(optimizer)) == last for optimizer in optimizers)

    def close(self) -> None:
        """Take it down."""
        self._handle.remove()


class Helper:
    """A thread for work that is to stay out of the training's way, one after the other; it starts with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Run it; it raises nothing. Where no thread is to be had, it is done here and now."""
        if self._thread is None:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                work()
                return
            self._thread = thread
        self._works.put(work)

    def close(self) -> None:
        """End, when what was started is over."""
        if self._thread is not None:
            self._works.put(None)
            self._thread.join()
            self._thread = None

    def leave(self) -> None:
        """Let the thread be: what it is at will not end."""
        self._thread = None

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # of this thread: do not take the core of the one that wakes it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        while (work := self._works.get()) is not None:
            work()
            del work  # and the tensors that it holds


def _hide_from_compiler(function: Any) -> None:
    """Have ``torch.compile`` call the hook rather than trace it (what ``torch._dynamo.disable`` does, without its import)."""
    function._torchdynamo_disable = True
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, skip)


def owned_by(optimizers: Iterable[Optimizer]) -> set[tuple[int, int]]:
    """Address and bytes of the parameters and the state of these optimizers: what changes in ``step()`` alone."""
    owned: set[tuple[int, int]] = set()
    for optimizer in optimizers:
        inner = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's own
        holders = [optimizer, inner] if isinstance(inner, Optimizer) else [optimizer]
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        for holder in holders:
            tensors += [
                value
                for state in holder.state.values()
                if isinstance(state, dict)
                for value in state.values()
            ]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                local = local_of(tensor)
                if can_wait(local) and local.numel():
                    owned.add(_place_of(local))
    return owned


def can_wait(local: torch.Tensor) -> bool:
    """Whether it can be copied behind a step: it counts how often it is written, and is where copies can be waited for."""
    is_here = local.device.type == "cpu" or gpu.is_queued(local)
    return is_here and not local.is_inference()


def _place_of(local: torch.Tensor) -> tuple[int, int]:
    return local.data_ptr(), local.numel() * local.element_size()
