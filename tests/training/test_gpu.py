"""Copies that are queued: the training's thread does not wait for them, and what goes wrong with them drops one snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from supervisor.training import gpu
from supervisor.training.arena import Arena
from supervisor.training.flight import CAPTURED, TORN, Flight, Samples
from supervisor.training.moves import Moves, Source, Spot
from tests.training.slow_gpu import SlowGpu

SIZE = 3000  # numbers of each tensor


class Copying:
    """A flight of some tensors, and the GPU that they are on."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, *, tensors: int = 3) -> None:
        self.gpu = SlowGpu()
        self.gpu.install(monkeypatch)
        self.tensors = [torch.full((SIZE,), float(number)) for number in range(tensors)]
        self.arena = Arena(path / "arena", tensors * SIZE * 4)
        moves = Moves()
        for number, tensor in enumerate(self.tensors):
            moves.add(self.arena, Spot(number * SIZE * 4, None), Source(tensor))
        self.flight = Flight(moves, Samples(moves, -1, 0), None, None)
        self._thread = threading.Thread(target=self.flight.run)

    def start(self) -> None:
        self._thread.start()

    def queue(self) -> None:
        """Until all is queued."""
        self.start()
        assert self.flight._all_queued.wait(60)

    @property
    def copied(self) -> list[float]:
        """The first number of each."""
        return [float(self.arena.view(at * SIZE * 4, (1,), torch.float32)) for at in range(len(self.tensors))]

    def end(self) -> None:
        self.flight.close()
        self._thread.join()


def test_the_fence_queues_and_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Copying(tmp_path, monkeypatch)
    held: list[Any] = []
    with monkeypatch.context() as patch:  # a stream that has not got there yet

        def after(marks: Any) -> None:
            held.append(marks)
            if threading.current_thread() is not threading.main_thread():
                one.gpu.after(marks)

        patch.setattr(gpu, "after", after)
        one.queue()
        one.flight.release()
    assert held[-1] == one.flight._end, "what comes next on the training's stream is behind the copy"
    assert not one.flight.is_over
    assert one.copied == [0.0, 0.0, 0.0], "nothing has happened yet"
    one.end()
    assert one.flight.is_over
    assert one.flight.problem is None
    assert one.copied == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("tensors", "change"),
    [(20, lambda tensors: tensors[15].add_(1)), (3, lambda tensors: tensors[1].data.add_(1))],
    ids=["counted, but no sample is of it", "around the counters, of which there is a sample"],
)
def test_what_was_changed_before_the_fence_is_seen(
    tensors: int,
    change: Callable[[list[torch.Tensor]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Copying(tmp_path, monkeypatch, tensors=tensors)
    one.queue()
    change(one.tensors)
    one.end()
    assert one.flight.problem == TORN


def test_what_was_changed_after_the_fence_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Copying(tmp_path, monkeypatch)
    one.queue()
    one.flight.release()
    one.tensors[1].add_(1)
    one.flight.release()  # another optimizer's
    one.end()
    assert one.flight.problem is None
    assert one.copied == [0.0, 1.0, 2.0]


def test_an_optimizer_step_that_is_captured_drops_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Copying(tmp_path, monkeypatch)
    one.queue()
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "is_captured", bool)
        one.flight.release()  # queues nothing: that would break the capture
    assert one.copied == [0.0, 0.0, 0.0]
    one.end()
    assert one.flight.problem == CAPTURED


def fails(*_: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("where", ["copy", "wait"])
def test_an_error_of_the_device_is_told_and_nobody_waits_for_ever(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Copying(tmp_path, monkeypatch)
    monkeypatch.setattr(gpu, where, fails)
    one.start()
    one.end()
    assert "illegal memory access" in str(one.flight.problem)


def test_copied_at_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Copying(tmp_path, monkeypatch)
    one.flight._moves.run()
    assert one.copied == [0.0, 1.0, 2.0]
    assert not one.flight._moves.differs()
    one.tensors[2].add_(1)
    assert one.flight._moves.differs()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_pages_that_no_gpu_takes(tmp_path: Path) -> None:
    arena = Arena(tmp_path / "arena", 4096)
    assert not arena.register(torch.device("cuda", 0))
    arena.put(0, b"as ever")


@pytest.mark.may_skip("few machines that run the tests have a GPU")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_real_one(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    tensors = [torch.randn(1 << 20, device=device) for _ in range(8)]
    arena = Arena(tmp_path / "arena", sum(tensor.nbytes for tensor in tensors))
    assert arena.register(device)
    moves, offset = Moves(), 0
    for tensor in tensors:
        moves.add(arena, Spot(offset, None), Source(tensor))
        offset += tensor.nbytes
    expected = [tensor.cpu() for tensor in tensors]
    for number in range(3):
        flight = Flight(moves, Samples(moves, -1, number), None, None)
        thread = threading.Thread(target=flight.run)
        thread.start()
        flight.release()
        torch._foreach_add_(tensors, 1)  # queued behind the copy
        flight.close()
        thread.join()
        assert flight.problem is None
        copied = arena.memory.view(torch.float32).split(1 << 20)
        assert all(torch.equal(one, other) for one, other in zip(copied, expected, strict=True))
        expected = [tensor.cpu() for tensor in tensors]
