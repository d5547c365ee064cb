"""What ``session.log`` is given: kept as it is, turned into numbers about once a second and at save points.

Reading a number out of a tensor on an accelerator waits for all work queued on it, so that is not done at every step.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from supervisor.errors import UsageError
from supervisor.training import gpu

PERIOD: Final = 1.0  # seconds


class Metrics:
    """The last value of each metric. ``publish`` is called with all of them, at most once a PERIOD.

    ``watch`` is called with what is logged, ``settle`` with all of them whenever they have been turned into numbers.
    """

    def __init__(self, publish: Callable[[dict[str, float]], None]) -> None:
        self._publish = publish
        self.watch: Callable[[Mapping[str, Any]], None] | None = None
        self.settle: Callable[[dict[str, float]], None] | None = None
        self._values: dict[str, Any] = {}
        self._next = 0.0

    def log(self, values: Mapping[str, Any]) -> None:
        """Take the newest values: numbers, or tensors of one element (kept without their graph).

        Raises UsageError for anything else, at once: a save point is no place to find out.
        """
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                self._values[name] = value.detach()
            elif isinstance(value, (float, int)) or (
                hasattr(value, "__float__") and getattr(value, "size", 1) == 1
            ):
                self._values[name] = value
            else:
                raise UsageError(
                    f"log({name}=…) takes a number or a tensor of one element, not {type(value).__name__}"
                )
        if self.watch is not None:
            self.watch({name: self._values[name] for name in values})
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PERIOD
            self._publish(self.numbers())

    def flush(self) -> None:
        """Publish the newest values, whenever that was done last."""
        if self._values:
            self._publish(self.numbers())

    def reading(self) -> Callable[[], dict[str, float]]:
        """What tells, later, every metric as it is now. Neither waits for more than a GPU has been given by now."""
        if self.settle is not None:  # each number is judged before a snapshot may count
            numbers = self.numbers()
            return lambda: numbers
        later = {
            name: gpu.reading(value)
            for name, value in self._values.items()
            if isinstance(value, torch.Tensor) and gpu.is_queued(value)
        }
        now = {name: _number(name, value) for name, value in self._values.items() if name not in later}
        return lambda: now | {name: _number(name, read()) for name, read in later.items()}

    def numbers(self) -> dict[str, float]:
        """Every metric as a number. Raises UsageError for what is none."""
        for name, value in self._values.items():
            self._values[name] = _number(name, value)
        numbers = dict(self._values)
        if self.settle is not None:
            self.settle(numbers)
        return numbers


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"log({name}=…) takes a number or a tensor of one element: {error}") from None


def loss_bits(loss: float) -> int:
    """A double as the word that holds it."""
    return int(struct.unpack("Q", struct.pack("d", loss))[0])
