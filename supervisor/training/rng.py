"""The state of every random number generator a rank draws from: Python's, numpy's, torch's, the accelerator's.

It is restored last, when the Session yields its first step: everything before may draw (``iter(loader)`` does).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


def capture(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """The state of the CPU's generators and of those of ``devices``. Draws nothing."""
    return captured(devices)()


def captured(devices: Iterable[torch.device] = ()) -> Callable[[], dict[str, Any]]:
    """As ``capture``, of now; but put into its form only when it is asked for."""
    version, words, spare = random.getstate()
    of_torch = torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    of_devices = {str(d): torch.get_device_module(d).get_rng_state(d) for d in devices}

    def form() -> dict[str, Any]:
        # as bytes: 625 numbers would be pickled one by one
        state: dict[str, Any] = {
            "python": (version, array("Q", words).tobytes(), spare),
            "torch": _bytes(of_torch),
        }
        if of_numpy is not None:
            state["numpy"] = _plain(of_numpy)
        if of_devices:
            state["devices"] = {name: _bytes(of_device) for name, of_device in of_devices.items()}
        return state

    return form


def _bytes(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _plain(state: Any) -> Any:
    """Of numpy's generator. Of bytes and numbers: those are pickled in no time, arrays are not."""
    if isinstance(state, tuple) and len(state) == 5:
        name, keys, position, has_spare, spare = state
        return str(name), keys.tobytes(), int(position), int(has_spare), float(spare)
    return state  # not the legacy generator's


def restore(state: dict[str, Any]) -> None:
    """Set every generator that ``capture`` recorded; devices that this process lacks are passed over."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(array("Q", words)), spare))
    torch.set_rng_state(_tensor(state["torch"]))
    if (recorded := state.get("numpy")) is not None:
        import numpy as np

        if isinstance(recorded, tuple):
            name, keys, *rest = recorded
            recorded = (name, np.frombuffer(keys, dtype=np.uint32), *rest)
        np.random.set_state(recorded)
    for name, device_state in state.get("devices", {}).items():
        module = torch.get_device_module(torch.device(name))
        if module.is_available() and (torch.device(name).index or 0) < module.device_count():
            module.set_rng_state(_tensor(device_state), torch.device(name))


def derive(state: dict[str, Any], rank: int) -> None:
    """Seed the generators of a rank that the checkpoint does not know, from rank 0's: repeatable, and its own stream."""
    digest = hashlib.blake2b(bytes(state["torch"]) + rank.to_bytes(8, "little"), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Whatever the block draws from the CPU's generators is put back."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


@functools.cache
def _has_accelerators() -> bool:
    """Whether there are any; asking takes a while, at each save point, and none is added to a process later."""
    return torch.accelerator.is_available()


def devices_among(places: Iterable[torch.device]) -> list[torch.device]:
    """The accelerators a rank draws on: its current one, if it has begun to use it, and those its parameters are on."""
    if not _has_accelerators():
        return []
    devices = {device for device in places if device.type not in ("cpu", "meta")}
    cuda: Any = torch.cuda
    if cuda.is_available() and cuda.is_initialized():
        devices.add(torch.device("cuda", cuda.current_device()))
    return sorted(devices, key=str)
