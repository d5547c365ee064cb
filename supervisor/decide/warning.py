"""Early warnings: does it look as if the training could go wrong? Nothing follows from them but words.

The supervisor samples about once a second what it knows anyway: the newest loss and norm of the gradients (rank 0's), the time of
a step, and what share of it is each rank's own. A sample in which no step was completed is none, so with slow steps every step
is one. In the order of the samples:

=========  ==========================================================================  ==========================
warning    raised                                                                      taken back
=========  ==========================================================================  ==========================
nan        the loss is not finite; the norm is not, ``NORM_PATIENCE`` times in a row   ``CALM`` finite samples
spike      as the guard's (``guard.Watch``), with a patience of two samples            the loss is back, or has a
                                                                                       new level
plateau    the mean loss of the last quarter of all samples is not below that of the   it is, by two standard
           second quarter (``plateau``), after 1000 samples                            errors
gradients  the norm is ``GROWTH`` times what it was, over ``SHORT`` samples            below ``CALM_GROWTH`` times
slower     steps take ``SLOWER`` times as long as early in the attempt                 below ``CALM_SLOWER`` times
=========  ==========================================================================  ==========================

*Gradients* are compared as logarithms; what they were is an average that stands still while they are above ``CALM_GROWTH``.

*Slower* compares medians: an evaluation or a checkpoint now and then is none. A rank is named whose own time (not spent waiting
for others, ``straggler``) has grown by at least half of what the steps have.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from supervisor.decide import straggler
from supervisor.decide.guard import GuardPolicy, Watch
from supervisor.decide.plateau import Plateau
from supervisor.model import WarningKind

NORM_PATIENCE: Final = 5  # samples, as are those that follow
CALM: Final = 5
SHORT: Final = 20
GROWTH: Final = 10.0
CALM_GROWTH: Final = 3.0
KNOWN_NORM: Final = 60
SLOWER: Final = 1.5
CALM_SLOWER: Final = 1.25
LEAST_SLOWER: Final = 0.002  # seconds
SETTLING: Final = 10
BASE: Final = 30
RECENT: Final = 30
SPIKE_POLICY: Final = GuardPolicy(mode="spike", patience=2)


class Sample(NamedTuple):
    """What is known after ``step`` completed steps; None: it was not logged. ``seconds`` of a step since the sample before."""

    step: int
    loss: float | None = None
    norm: float | None = None
    seconds: float | None = None
    own_shares: Mapping[int, float] = {}
    world_size: int | None = None
    nodes: Sequence[str] = ()  # their names, by rank, where there are several


class Change(NamedTuple):
    """A warning that is raised, or (``text`` None) taken back."""

    kind: WarningKind
    step: int
    text: str | None
    rank: int | None = None


class Lookout:
    """Give it the samples of a job in their order; it says what has changed. No clock, no side effect."""

    def __init__(self, loss: str = "loss", norm: str = "grad_norm") -> None:
        self._loss, self._norm = loss, norm
        self._furthest = -1
        self._raised: dict[WarningKind, int | None] = {}  # kind → rank
        self._watch = Watch(SPIKE_POLICY)
        self._finite = self._infinite = 0  # in a row
        self._plateau = Plateau()
        self._growth = _Growth()
        self._pace = _Pace()

    def begin(self) -> None:
        """A new attempt: what was raised is forgotten, and so is how long steps took."""
        self._raised = {}
        self._pace = _Pace()

    def see(self, sample: Sample) -> list[Change]:
        """One more sample. Steps that are done again say nothing new but how long they take."""
        changes = self._see_pace(sample)
        if sample.step <= self._furthest:
            return changes
        self._furthest = sample.step
        return [*self._see_loss(sample), *self._see_norm(sample), *changes]

    def _see_loss(self, sample: Sample) -> list[Change]:
        loss, step = sample.loss, sample.step
        if loss is None:
            return []
        if not math.isfinite(loss):
            self._finite = 0
            return self._set(WarningKind.NAN, step, f"{self._loss} is {loss:g} since step {step}")
        self._finite += 1
        changes = self._clear(WarningKind.NAN, step) if self._finite >= CALM and not self._infinite else []
        if (spike := self._watch.loss(step, loss)) is not None:
            usual = f", it was {spike.usual:.4g}" if spike.usual is not None else ""
            text = f"{self._loss} has jumped to {spike.value:.4g} at step {spike.step}{usual}"
            changes += self._set(WarningKind.SPIKE, step, text)
        elif not self._watch.is_rising:
            changes += self._clear(WarningKind.SPIKE, step)
        flat = self._plateau.see(step, loss)
        if flat is None:
            return changes + self._clear(WarningKind.PLATEAU, step)
        since, then, now = flat
        text = f"{self._loss} has not fallen since step {since}: then it was {then:.4g} on average, now {now:.4g}"
        return changes + self._set(WarningKind.PLATEAU, step, text)

    def _see_norm(self, sample: Sample) -> list[Change]:
        norm, step = sample.norm, sample.step
        if norm is None:
            return []
        if not math.isfinite(norm):
            self._infinite += 1
            if self._infinite < NORM_PATIENCE:
                return []
            return self._set(WarningKind.NAN, step, f"{self._norm} is {norm:g} at step {step}, as before")
        self._infinite = 0
        growth = self._growth.see(norm)
        if growth > GROWTH:
            text = f"{self._norm} has grown {growth:.0f}-fold, to {norm:.3g} at step {step}"
            return self._set(WarningKind.GRADIENTS, step, text)
        return self._clear(WarningKind.GRADIENTS, step) if growth < CALM_GROWTH else []

    def _see_pace(self, sample: Sample) -> list[Change]:
        if sample.seconds is None:
            return []
        step, pace = sample.step, self._pace
        pace.see(sample.seconds, sample.own_shares)
        was, now = pace.was, pace.now
        if was is None or now is None:
            return []
        if now > SLOWER * was and now - was > LEAST_SLOWER:
            rank = pace.slower_rank(now - was)
            whose = "" if rank is None else f"; what has grown is rank {rank}'s own time"
            node = None if rank is None else straggler.node_of(rank, sample.world_size, sample.nodes)
            whose += "" if node is None else f", on node {node}"
            text = f"steps take {_seconds(now)}, early in this attempt they took {_seconds(was)}{whose}"
            return self._set(WarningKind.SLOWER, step, text, rank)
        return self._clear(WarningKind.SLOWER, step) if now < CALM_SLOWER * was else []

    def _set(self, kind: WarningKind, step: int, text: str, rank: int | None = None) -> list[Change]:
        if kind in self._raised:
            return []
        self._raised[kind] = rank
        return [Change(kind, step, text, rank)]

    def _clear(self, kind: WarningKind, step: int) -> list[Change]:
        if kind not in self._raised:
            return []
        return [Change(kind, step, None, self._raised.pop(kind))]


class _Growth:
    """How many times what it was the norm of the gradients is."""

    def __init__(self) -> None:
        self._count = 0
        self._short = self._long = 0.0

    def see(self, norm: float) -> float:
        """1 while too little is known."""
        value = math.log(max(norm, 1e-30))
        self._count += 1
        self._short += max(1 / self._count, 1 / SHORT) * (value - self._short)
        if self._count <= KNOWN_NORM or self._short - self._long < math.log(CALM_GROWTH):
            self._long += 1 / min(self._count, max(50.0, self._count / 5)) * (value - self._long)
        if self._count <= KNOWN_NORM:
            return 1.0
        return math.exp(min(self._short - self._long, 100.0))


class _Pace:
    """How long steps take, now and early in the attempt, and how much of it is each rank's own."""

    def __init__(self) -> None:
        self._count = 0
        self._early: list[tuple[float, dict[int, float]]] = []
        self._recent: deque[tuple[float, dict[int, float]]] = deque(maxlen=RECENT)
        self.was: float | None = None

    def see(self, seconds: float, own_shares: Mapping[int, float]) -> None:
        """One more sample."""
        self._count += 1
        sample = seconds, {rank: share * seconds for rank, share in own_shares.items()}
        if SETTLING < self._count <= SETTLING + BASE:
            self._early.append(sample)
            if len(self._early) == BASE:
                self.was = statistics.median(each for each, _ in self._early)
        elif self._count > SETTLING + BASE:
            self._recent.append(sample)

    @property
    def now(self) -> float | None:
        """The median of the newest samples; None while they are few."""
        return statistics.median(each for each, _ in self._recent) if len(self._recent) == RECENT else None

    def slower_rank(self, grown: float) -> int | None:
        """The one rank whose own time accounts for what a step's time has ``grown`` by."""
        growth = {
            rank: _median(self._recent, rank) - _median(self._early, rank) for rank in self._recent[-1][1]
        }
        ranks = [rank for rank, seconds in growth.items() if seconds >= grown / 2]
        return ranks[0] if len(ranks) == 1 and len(growth) > 1 else None


def _median(
    samples: deque[tuple[float, dict[int, float]]] | list[tuple[float, dict[int, float]]], rank: int
) -> float:
    known = [own[rank] for _, own in samples if rank in own]
    return statistics.median(known) if known else math.inf


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
