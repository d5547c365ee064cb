"""Which checkpoints to remove.

A checkpoint is kept if any rule wants it: the last N, every one at a multiple of K steps, the best M by a metric.
Whatever the rules say, the newest good one is kept, and so are the protected ones (being read or written). Those
with a problem are left alone: they count for no rule, and removing them is the user's decision.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from supervisor.errors import ConfigError


class Retained(Protocol):
    """What the rules look at; a ``CheckpointRecord`` is one."""

    @property
    def step(self) -> int:
        """Completed steps."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those logged when it was made."""
        ...

    @property
    def problem(self) -> str | None:
        """Why it cannot be resumed from; None for a good one."""
        ...


class Mode(enum.StrEnum):
    """Which end of a metric is the good one."""

    MIN = "min"
    MAX = "max"


@dataclass(frozen=True, kw_only=True)
class KeepBest:
    """Keep the ``count`` best by ``metric``; where it is equal, the newer one is better."""

    metric: str
    mode: Mode
    count: int

    def __post_init__(self) -> None:
        if not self.metric:
            raise ConfigError("keep_best needs the name of a metric")
        if self.count < 1:
            raise ConfigError(f"keep_best of {self.count}: at least 1")

    @classmethod
    def parse(cls, text: str) -> KeepBest:
        """From ``METRIC:min|max:M``, e.g. ``loss:min:3``. Raises ConfigError."""
        metric, *rest = text.rsplit(":", 2)
        if len(rest) != 2 or rest[0] not in tuple(Mode) or not (rest[1].isascii() and rest[1].isdigit()):
            raise ConfigError(f"keep_best of {text!r}: METRIC:min|max:M is required, e.g. loss:min:3")
        return cls(metric=metric, mode=Mode(rest[0]), count=int(rest[1]))


@dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """The rules; None switches one off."""

    keep_last: int = 3
    keep_every: int | None = None  # steps
    keep_best: KeepBest | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(
                f"keep_last of {self.keep_last}: at least 1, the newest good one is never removed"
            )
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(f"keep_every of {self.keep_every} steps: at least 1")


def to_remove(
    records: Iterable[Retained], policy: RetentionPolicy, protected: Collection[int] = ()
) -> set[int]:
    """The steps of the checkpoints that no rule keeps.

    A record without a problem is taken for good: whoever has not verified the newest one passes the step of the
    newest that is verified in ``protected``.
    """
    good = sorted(
        (record for record in records if record.problem is None), key=lambda r: r.step, reverse=True
    )
    kept = {record.step for record in good[: policy.keep_last]} | set(protected)
    if policy.keep_every is not None:
        kept |= {record.step for record in good if record.step % policy.keep_every == 0}
    if policy.keep_best is not None:
        kept |= _best(good, policy.keep_best)
    return {record.step for record in good} - kept


def _best(good: Iterable[Retained], rule: KeepBest) -> set[int]:
    """Steps of the best; a checkpoint whose metric is missing or not finite is never among them."""
    sign = 1 if rule.mode is Mode.MIN else -1
    ranked = sorted(
        (sign * value, -record.step)
        for record in good
        if (value := record.metrics.get(rule.metric)) is not None and math.isfinite(value)
    )
    return {-negated for _, negated in ranked[: rule.count]}
