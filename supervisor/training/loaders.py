"""torchdata's StatefulDataLoader, made exact.

Three things would change bits if nobody took care:

- ``state_dict()`` of a loader that nobody iterates yet makes an iterator, which draws a seed from the global generator
  now instead of later. The state of such a loader is the one it was last given, or none.
- The first ``iter()`` after a resume rebuilds the iterator that was there, and draws. In the undisturbed run nothing is
  drawn at that moment (the iterator is there already), so those draws are put back: whether the script makes its
  iterator before the loop or lazily in the first step, and before or after the random state is restored. A second
  iterator (the next epoch) draws as ever.
- A ``generator`` given to the loader serves its sampler and the seeds of its workers; the loader's state has it as it was
  before the epoch, and replays the sampler's draws only. It is kept as it is, and put back after the replay.

What worker processes draw *inside* a dataset is beyond a loader's state: let randomness there depend on the index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from supervisor.training import rng
from supervisor.training.world import say


def is_stateful_loader(value: object) -> bool:
    """Whether it is a StatefulDataLoader, or something built like one."""
    return isinstance(value, DataLoader) and all(
        hasattr(value, name) for name in ("state_dict", "next_iter_state", "_iterator", "_get_iterator")
    )


class LoaderState:
    """A StatefulDataLoader's state, and where its generators stand."""

    def __init__(self, name: str, loader: Any) -> None:
        self._name = name
        self._loader = loader

    def get(self) -> dict[str, Any]:
        """The position (None: nobody iterates it yet) and the generators. Draws nothing."""
        loader = self._loader
        if loader._iterator is not None:
            position = loader.state_dict()
        else:
            position = loader.next_iter_state
        return {
            "position": position,
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def put(self, state: dict[str, Any]) -> None:
        """Have the loader's next iterator go on from there."""
        loader = self._loader
        if loader._iterator is not None and not loader._initial_iter_for_state_dict:
            say(
                f"{self._name!r} was iterated before the Session was entered: that iterator does not resume, make another"
            )
        position, generators = state["position"], state["generators"]
        loader.load_state_dict(position if position is not None else {})
        self._set_generators(generators)
        if position is not None:
            self._keep_still(generators)

    def _keep_still(self, generators: list[torch.Tensor]) -> None:
        """Make the next iterator, which replays the past, leave no trace in any generator."""
        loader = self._loader
        make = type(loader)._get_iterator

        def replay() -> Any:
            del loader._get_iterator  # once
            with rng.untouched():
                iterator = make(loader)
            self._set_generators(generators)
            return iterator

        loader._get_iterator = replay

    def _generators(self) -> list[torch.Generator]:
        sampler = getattr(self._loader.batch_sampler, "sampler", None)
        owners = (self._loader, self._loader.sampler, self._loader.batch_sampler, sampler)
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=False):
            generator.set_state(state)
