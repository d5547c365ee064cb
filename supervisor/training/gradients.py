"""Gradients are state, but not saved: a save point waits until none are pending.

They are pending while a step accumulates them. An optimizer is *clean* at the end of a step in which it stepped (what
lies in ``.grad`` then is spent), and whenever its gradients are all None or zero. Each is judged on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


class Gradients:
    """Watches the optimizers of a Session. ``stepped`` is cleared by the Session after each step."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._optimizers = dict(optimizers)
        self.stepped = [False] * len(self._optimizers)
        self.none_stepped = tuple(self.stepped)
        self._handles = [
            optimizer.register_step_post_hook(_noter(self.stepped, index))
            for index, optimizer in enumerate(self._optimizers.values())
        ]

    def pending(self) -> list[str]:
        """The names of the optimizers with gradients that have not been used yet. Looks at ``.grad``: save points only."""
        return [
            name
            for (name, optimizer), stepped in zip(self._optimizers.items(), self.stepped, strict=True)
            if not stepped and _has_gradients(optimizer)
        ]

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


def _noter(stepped: list[bool], index: int) -> Any:
    def note(_optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        stepped[index] = True

    return note


def _has_gradients(optimizer: Optimizer) -> bool:
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    return any(bool((_local(g) != 0).any()) for g in gradients if g is not None)


def _local(gradient: Any) -> Any:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
