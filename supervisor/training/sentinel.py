"""A rank's half of the numeric guard: looks at each number as it is logged (the theory is in ``decide/guard.py``).

It never waits for a device. A number that is on the host already (a float, a tensor in the CPU's memory) is looked at at once.
One that lies on an accelerator is looked at when ``metrics`` reads it, about once a second and at save points, as that is
done anyway: so always before a snapshot that was taken after it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from supervisor.decide.guard import NOTHING, Finding, GuardPolicy, Known, Watch
from supervisor.edge.control import Word
from supervisor.training.loaders import LoaderState

_PROVEN: Final = int(Word.PROVEN)


class Sentinel:
    """``look`` is called with what is logged in a training step, ``settle`` with the numbers once they were read."""

    def __init__(
        self,
        policy: GuardPolicy,
        words: memoryview,
        tell: Callable[..., None],
        loaders: Mapping[str, LoaderState],
        known: Known = NOTHING,
    ) -> None:
        self._watch = Watch(policy, known)
        self._judges = {policy.loss: self._watch.loss, policy.norm: self._watch.norm}
        self._loss = policy.loss
        self._words, self._tell = words, tell
        self._loaders = loaders if policy.skip else {}
        self._places: dict[str, tuple[int, object, int]] = {}  # step, iterator, batches it has given
        self._batches: dict[str, int] = {}
        self._unread: dict[str, int] = {}  # metric → the step that it is of

    def look(self, step: int, values: Mapping[str, Any]) -> None:
        """``step`` runs, and this was logged in it."""
        if self._loaders:
            self._count(step)
        for name, judge in self._judges.items():
            value = values.get(name)
            if value is None:
                continue
            if type(value) is not float:
                if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                    self._unread[name] = step
                    continue
                value = float(value)
            if (finding := judge(step, value)) is not None:
                self._say(name, finding)
        if (good := self._watch.good) is not None:
            self._words[_PROVEN] = good + 1

    def settle(self, numbers: Mapping[str, float]) -> None:
        """What was logged has been read from its device."""
        if not self._unread:
            return
        unread, self._unread = self._unread, {}
        for name, step in unread.items():
            if (finding := self._judges[name](step, numbers[name])) is not None:
                self._say(name, finding)
        if (good := self._watch.good) is not None:
            self._words[_PROVEN] = good + 1

    def _say(self, metric: str, finding: Finding) -> None:
        good = self._watch.good
        self._tell(
            "trouble", finding=finding.kind.value, metric=metric, step=finding.step, value=finding.value,
            usual=finding.usual, limit=finding.limit, batches=self._batches,
            good=good if good is None or metric == self._loss else min(good, finding.step - 1),
        )  # fmt: skip

    def _count(self, step: int) -> None:
        """How many batches a step takes of each loader, for a window of them to be left out."""
        for name, loader in self._loaders.items():
            iterator, given = loader.place()
            last_step, last_iterator, last_given = self._places.get(name, (-2, None, 0))
            if iterator is last_iterator and step == last_step + 1 and given > last_given:
                self._batches[name] = given - last_given
            self._places[name] = step, iterator, given
