"""The numeric guard: have the numbers of a training gone wrong, and since which step?

It looks at what ``session.log`` is given under two names, the loss and the norm of the gradients, on every rank that logs
them. Each rank has a ``Watch`` of its own, which takes one number a step and keeps five numbers in mind:

- *nan*: a loss that is not finite, at once. A norm that is not finite, only when it has been so for ``NORM_PATIENCE`` logged
  steps in a row: under mixed precision a gradient scaler meets some while it searches for its scale, and skips those steps.
- *spike*: a loss that lies further above its mean than ``factor`` mean absolute deviations, and than ``LEAST`` of the mean
  itself, for ``patience`` logged steps in a row. Mean and deviation forget over ``MEMORY`` steps; they learn nothing from numbers
  under suspicion and judge nothing before ``WARM_UP`` steps. Only the upper side counts: a loss that falls is what one wants.

What ranks see becomes *one* finding (``agree``). Weights are shared, so a loss that is not finite on one rank spoils all: one
rank is enough. A spike on one rank alone is a hard batch: more than half of the ranks that log a loss must see it, at about
the same step.

*Which states are bad* follows from what was seen to be good, not from when the trouble showed. A state after ``s`` steps is
*proven* when the loss of step ``s``, which was computed from it, was in order. What was saved beyond the last proven state is
not to be used again, though the trouble may show steps later (a loss that is logged every hundredth step, or a number that
lies on an accelerator and is read about once a second).

*A new level.* A jump that comes again however often the job goes back is what this training does (other data, a loss with
another term from some step on), and no reason to end it. ``rollback`` decides that, and the next attempts' watches are told the
step: a jump ``NEAR`` it makes them begin anew with what is usual. So that it is seen to come again though the job may have gone
back by fewer than ``WARM_UP`` steps, the watches are told, too, what was a spike then, and judge by that near its step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from supervisor.errors import ConfigError
from supervisor.failing import Trouble, TroubleKind

MODES: Final = ("off", "nan", "spike")
WARM_UP: Final = 50  # steps
MEMORY: Final = 100.0  # steps
LEAST: Final = 0.1  # of the mean
NORM_PATIENCE: Final = 20  # steps; a gradient scaler that starts at 65536 halves at most 16 times to 1
NEW_LEVEL: Final = 10  # times the patience: so long a rise that the other ranks do not see is a new level
NEAR: Final = 20  # steps between two ranks' first sight of the same spike


@dataclass(frozen=True, kw_only=True)
class GuardPolicy:
    """What is watched and what follows. Raises ConfigError."""

    mode: str = "off"  # off, nan, or spike (and nan)
    loss: str = "loss"
    norm: str = "grad_norm"
    factor: float = 10.0  # mean absolute deviations
    patience: int = 3  # steps
    skip: int = 0  # steps to leave out, up to the trouble; 0: none
    times: int = 3  # rollbacks without getting past the trouble
    back: int = 1  # checkpoints further back at each repetition

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"--guard {self.mode!r}; allowed: {', '.join(MODES)}")
        if not self.factor >= 2:
            raise ConfigError(
                f"--guard-factor {self.factor:g}: 2 or more is required, noise alone reaches that"
            )
        for name, least in (("patience", 1), ("times", 0), ("back", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--guard-{name} {getattr(self, name)}: at least {least}")
        if not self.loss or not self.norm or self.loss == self.norm:
            raise ConfigError(
                f"--guard-loss {self.loss!r} and --guard-norm {self.norm!r}: two names of metrics are required"
            )

    @property
    def is_on(self) -> bool:
        """Whether anything is watched."""
        return self.mode != "off"


class Finding(NamedTuple):
    """What one rank's watch has found. ``step`` is the first whose number is wrong."""

    kind: TroubleKind
    step: int
    value: float
    usual: float | None = None
    limit: float | None = None


class Known(NamedTuple):
    """What earlier attempts have met."""

    levels: Sequence[int] = ()  # steps in which the loss comes to a new level that is accepted
    step: int = 0  # of the jump that the job has gone back for …
    limit: float | None = None  # … and what was one; None: it has not


NOTHING: Final = Known()


class Watch:
    """One rank's view of its numbers: give it each in the order of steps. Tells each trouble once."""

    def __init__(self, policy: GuardPolicy, known: Known = NOTHING) -> None:
        self._spikes = policy.mode == "spike"
        self._known = known
        self._factor, self._patience = policy.factor, policy.patience
        self._mean = self._deviation = 0.0
        self._count = 0
        self._rising = self._infinite = 0  # in a row
        self._rising_from = self._infinite_from = 0
        self._lost = False
        #: the last step whose loss was in order; None: there was none yet
        self.good: int | None = None

    def loss(self, step: int, value: float) -> Finding | None:
        """The loss of ``step``."""
        if value - value != 0.0:  # of nan and of the infinities this is nan
            return self._is_lost(Finding(TroubleKind.NAN, step, value))
        if self._spikes:
            limit = self._limit(step)
            if value > limit:
                return self._rises(step, value, limit)
            self._learn(value)
        self._rising = 0
        self.good = step
        return None

    @property
    def is_rising(self) -> bool:
        """Whether the newest number was far above what it was."""
        return self._rising > 0

    def norm(self, step: int, value: float) -> Finding | None:
        """The norm of the gradients of ``step``."""
        if value - value == 0.0:
            self._infinite = 0
            return None
        if not self._infinite:
            self._infinite_from = step
        self._infinite += 1
        if self._infinite < NORM_PATIENCE:
            return None
        return self._is_lost(Finding(TroubleKind.NAN, self._infinite_from, value))

    def _is_lost(self, finding: Finding) -> Finding | None:
        told, self._lost = self._lost, True
        return None if told else finding

    def _limit(self, step: int) -> float:
        """What the loss of ``step`` must exceed to be suspect."""
        if self._count >= WARM_UP:
            return self._mean + max(self._factor * self._deviation, LEAST * abs(self._mean))
        known = self._known
        near = abs(step - known.step) <= NEAR or self._rising
        return known.limit if known.limit is not None and near else math.inf

    def _rises(self, step: int, value: float, limit: float) -> Finding | None:
        if not self._rising:
            self._rising_from = step
        self._rising += 1
        if self._rising == self._patience:
            if not any(abs(self._rising_from - level) <= NEAR for level in self._known.levels):
                usual = self._mean if self._count else None
                return Finding(TroubleKind.SPIKE, self._rising_from, value, usual, limit)
            self._begin_anew(step, value)
        elif self._rising >= NEW_LEVEL * self._patience:
            self._begin_anew(step, value)
        return None

    def _begin_anew(self, step: int, value: float) -> None:
        """This is usual from now on."""
        self._count = self._rising = 0
        self._known = self._known._replace(limit=None)
        self._learn(value)
        self.good = step

    def _learn(self, value: float) -> None:
        self._count += 1
        if self._count == 1:
            self._mean, self._deviation = value, 0.0
            return
        weight = max(1 / self._count, 1 / MEMORY)
        rise = value - self._mean
        self._mean += weight * rise
        self._deviation += weight * (abs(rise) - self._deviation)


def agree(seen: Mapping[int, Trouble], watching: int) -> Trouble | None:
    """What all ranks are ended for, given each rank's newest trouble and how many ranks log a loss; None: nothing yet."""
    lost = [trouble for trouble in seen.values() if trouble.kind is TroubleKind.NAN]
    if lost:
        return min(lost, key=lambda trouble: (trouble.step, trouble.rank))
    for anchor in seen.values():
        near = [trouble for trouble in seen.values() if 0 <= trouble.step - anchor.step <= NEAR]
        if 2 * len(near) > watching:
            known = [trouble.good for trouble in near if trouble.good is not None]
            limits = [trouble.limit for trouble in near if trouble.limit is not None]
            return replace(
                anchor,
                good=min(known) if len(known) == len(near) else None,
                limit=max(limits, default=None),
            )
    return None


def reason(trouble: Trouble) -> str:
    """In plain words."""
    where = f"in step {trouble.step} (rank {trouble.rank})"
    if trouble.kind is TroubleKind.NAN:
        return f"{trouble.metric} is {trouble.value:g} {where}"
    usual = f", it was {trouble.usual:.4g}" if trouble.usual is not None else ""
    return f"{trouble.metric} has jumped to {trouble.value:.4g}{usual}, {where}"
