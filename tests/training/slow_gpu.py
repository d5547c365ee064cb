"""A GPU that isn't one, as slow as a GPU may be: tensors of the CPU, and copies beside the training that happen when they must.

The training's own stream is always idle: what is done there happens at once. The stream beside it does nothing before the training's
stream has to wait for it, or the training itself does. So every copy that somebody forgot to wait for comes too late, and is
found. So is what is queued beside without coming after what the training was marked to have been given.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from supervisor.training import gpu
from supervisor.training.flight import Flight

LARGE = 1 << 12  # bytes of what is on it; what is smaller is on the CPU


class SlowGpu:
    """``copied`` counts copies that were made late."""

    def __init__(self) -> None:
        self.copied = 0
        self._queue: list[Callable[[], None]] = []
        self._running = threading.Lock()
        self._is_waited_for = threading.Event()
        self._thread = threading.local()
        self._marked: object = None  # where the training's stream was marked last
        self._come_after: object = None  # by the stream beside

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "is_queued", self.is_queued)
        for function in (self.mark, self.after, self.wait, self.beside, self.copy):
            monkeypatch.setattr(gpu, function.__name__, function)
        monkeypatch.setattr(gpu, "scratch", lambda size: torch.empty(size, dtype=torch.uint8, device="cpu"))
        monkeypatch.setattr(gpu, "is_captured", lambda _devices: False)
        monkeypatch.setattr(gpu, "of", lambda _optimizers: None)
        wait = Flight._wait

        def standing(flight: Flight, event: threading.Event) -> None:
            if event is flight._over:
                self._is_waited_for.set()
            wait(flight, event)
            self._is_waited_for.clear()

        monkeypatch.setattr(Flight, "_wait", standing)

    @property
    def _is_beside(self) -> bool:
        return getattr(self._thread, "beside", False)

    def is_queued(self, tensor: torch.Tensor) -> bool:
        return tensor.nbytes > LARGE

    def mark(self, devices: Iterable[torch.device]) -> Any:
        """Of the training's stream: reached. Of the one beside: an event at its end."""
        reached = threading.Event()
        if not self._is_beside:
            reached.set()
            self._marked = reached
            return [(device, reached) for device in devices]
        marks = [(device, reached) for device in devices]
        if marks:
            self._queue.append(reached.set)
        return marks

    def after(self, marks: Any) -> None:
        for _, reached in marks:
            if self._is_beside:
                self._come_after = reached
            else:
                self._run_until(reached)

    def wait(self, marks: Any) -> None:
        for _, reached in marks:
            if not reached.is_set():
                assert threading.current_thread() is not threading.main_thread(), "the training waits"
                assert self._is_waited_for.wait(60)
                self._run_until(reached)

    def _run_until(self, reached: threading.Event) -> None:
        with self._running:
            while not reached.is_set():
                self._queue.pop(0)()

    @contextlib.contextmanager
    def beside(self, devices: Iterable[torch.device]) -> Iterator[None]:
        self._thread.beside = bool(list(devices))
        yield
        self._thread.beside = False

    def copy(self, places: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        def work() -> None:
            with torch.no_grad():
                torch._foreach_copy_(places, tensors)

        if self._is_beside:
            assert self._come_after is self._marked, "what the training's stream has to do is not waited for"
            self._queue.append(work)
            self.copied += len(places)
        else:
            work()
