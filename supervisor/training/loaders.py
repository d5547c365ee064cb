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

Steps that are left out take their batches with them: these are fetched and thrown away, and draw what they would have drawn.

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
        self._to_drop = 0  # batches, of the iterator that is made next

    def place(self) -> tuple[object, int]:
        """The iterator in use, if there is one, and how many batches it has given."""
        iterator = self._loader._iterator
        return iterator, getattr(iterator, "_num_yielded", 0)

    def drop(self, count: int) -> None:
        """Leave out the next ``count`` batches: of the iterator in use, then of the one made next."""
        loader = self._loader
        iterator = loader._iterator
        if iterator is not None:
            count -= _dropped(iterator, count)
        if count:
            self._to_drop += count
            self._await_iterator()

    def _await_iterator(self) -> None:
        """Be there when the next iterator comes to be: a new one, or the one that persistent workers serve, reset."""
        loader = self._loader
        if "_get_iterator" not in vars(loader):
            loader._get_iterator = self._make_and_drop
        if loader._iterator is not None and loader.persistent_workers and loader.num_workers > 0:
            loader._iterator._reset = self._reset_and_drop

    def _make_and_drop(self) -> Any:
        loader = self._loader
        del loader._get_iterator  # once
        iterator = loader._get_iterator()
        self._drop_from(iterator)
        return iterator

    def _reset_and_drop(self, loader: Any, first_iter: bool = False) -> None:
        iterator = loader._iterator
        del iterator._reset  # once
        vars(loader).pop("_get_iterator", None)
        iterator._reset(loader, first_iter)
        self._drop_from(iterator)

    def _drop_from(self, iterator: Any) -> None:
        count, self._to_drop = self._to_drop, 0
        self._to_drop = count - _dropped(iterator, count)
        if self._to_drop:  # it is over already: the rest is the next one's
            self._await_iterator()

    def get(self) -> dict[str, Any]:
        """The position (None: nobody iterates it yet) and the generators. Draws nothing."""
        loader = self._loader
        if loader._iterator is not None:
            position = loader.state_dict()
        else:
            position = loader.next_iter_state
        state = {
            "position": position,
            "generators": [generator.get_state() for generator in self._generators()],
        }
        return {**state, "drop": self._to_drop} if self._to_drop else state

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
        self._to_drop = state.get("drop", 0)
        if self._to_drop and position is None:
            self._await_iterator()

    def _keep_still(self, generators: list[torch.Tensor]) -> None:
        """Make the next iterator, which replays the past, leave no trace in any generator."""
        loader = self._loader
        make = type(loader)._get_iterator

        def replay() -> Any:
            del loader._get_iterator  # once
            with rng.untouched():
                iterator = make(loader)
            self._set_generators(generators)
            self._drop_from(iterator)
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


def _dropped(iterator: Any, count: int) -> int:
    """Fetch ``count`` batches and throw them away; how many there were."""
    for done in range(count):
        try:
            next(iterator)
        except StopIteration:
            return done
    return count
