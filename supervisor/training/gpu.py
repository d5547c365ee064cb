"""Copies from a GPU: queued on a stream beside the training's, into registered pages, so that its CPU never waits for them.

What is queued on a stream happens later, and in order. So where the training stands is an event on its stream (``mark``), to
*come after* it is to have another stream wait for that event (``after``), and only who must know that something has happened
waits with a thread (``wait``).

CUDA only, and what torch calls so (ROCm). Other accelerators' tensors are copied while the training stands.

Source: CUDA Runtime API: streams, events, ``cudaHostRegister``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch.optim import Optimizer

_PORTABLE: Final = 1  # registered for every context of this process
_RELAXED: Final = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_cuda: Any = torch.cuda
#: where streams of devices stand
Marks = Sequence[tuple[torch.device, Any]]


def is_queued(tensor: torch.Tensor) -> bool:
    """Whether what is done with it is queued."""
    return tensor.device.type == "cuda"


def mark(devices: Iterable[torch.device]) -> Marks:
    """Where the current streams stand now."""
    marks = []
    for device in devices:
        event = _cuda.Event(blocking=True)  # whoever waits for it sleeps
        event.record(_cuda.current_stream(device))
        marks.append((device, event))
    return marks


def after(marks: Marks) -> None:
    """What is queued on the current streams from now on comes after these marks. Waits for nothing."""
    for device, event in marks:
        _cuda.current_stream(device).wait_event(event)


def wait(marks: Marks) -> None:
    """Until they are reached. Raises RuntimeError when something queued before them has failed."""
    for _, event in marks:
        event.synchronize()


@contextlib.contextmanager
def beside(devices: Iterable[torch.device]) -> Iterator[None]:
    """The streams beside the training's are the current ones of this thread."""
    with contextlib.ExitStack() as stack:
        for device in devices:
            _let_captures_be()
            stack.enter_context(
                _cuda.device(device)
            )  # else this thread would make a context on the first GPU
            stack.enter_context(_cuda.stream(_stream_beside(device)))
        yield


def _let_captures_be() -> None:
    """What this thread calls is no part of a graph that another captures, and must not end that (as in ``global`` mode it would)."""
    mode = ctypes.c_int(_RELAXED)
    with contextlib.suppress(OSError, AttributeError):  # ROCm's are not asked
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _stream_beside(device: torch.device) -> Any:
    return _cuda.Stream(device)


def copy(places: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """Queue copies on the current streams."""
    with torch.no_grad():
        torch._foreach_copy_(places, tensors, non_blocking=True)


def reading(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What tells, on the CPU, the value that a small tensor has now: it waits for what was queued before, and nothing else."""
    place = scratch(tensor.nbytes).view(tensor.dtype)
    copy([place], [tensor.reshape(-1)])
    reached = mark([tensor.device])

    def read() -> torch.Tensor:
        wait(reached)
        return place

    return read


def is_captured(devices: Collection[torch.device]) -> bool:
    """Whether what is queued now on the current streams is not done, but noted as a graph."""
    return bool(devices) and bool(_cuda.is_current_stream_capturing())


def scratch(size: int) -> torch.Tensor:
    """So many bytes that can be copied into without waiting."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def of(optimizers: Iterable[Optimizer]) -> torch.device | None:
    """The device of the first parameter that is on one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if is_queued(parameter):
                    return torch.device(parameter.device)
    return None


def register(address: int, size: int, owner: object, device: torch.device) -> bool:
    """Have the device copy straight into these pages, for as long as there is an ``owner``. Whether it does; else copies are slower.

    ``owner`` must let the pages go only when it ends, and have said so before (``weakref.finalize``).
    """
    done: list[bool] = []

    def work() -> None:
        with contextlib.suppress(Exception):
            _let_captures_be()
            _cuda.set_device(device)
            done.append(int(_cuda.cudart().cudaHostRegister(address, size, _PORTABLE)) == 0)

    # in a thread of its own: an error of CUDA's is left for whatever this thread does next
    thread = threading.Thread(target=work, name="everstep-register")
    thread.start()
    thread.join()
    if done != [True]:
        return False
    weakref.finalize(owner, _cuda.cudart().cudaHostUnregister, address).atexit = False
    return True
