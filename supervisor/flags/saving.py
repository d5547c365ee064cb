"""How often the state is saved, where to, and what is kept of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from supervisor.amounts import parse_rate
from supervisor.checkpoint import location
from supervisor.checkpoint.location import TIMEOUT, Location
from supervisor.decide.retention import KeepBest, RetentionPolicy
from supervisor.errors import ConfigError
from supervisor.flags.reading import Group, flag, interval, option, path, seconds, text, whole
from supervisor.intervals import Interval, Unit

SNAPSHOT_EVERY: Final = Interval(unit=Unit.SECONDS, value=30)
CHECKPOINT_EVERY: Final = Interval(unit=Unit.AUTO)


def _checkpoints(value: object) -> Location:
    place = text(value)
    return location.parse(place) if location.is_url(place) else path(place)


def _keep_best(value: object) -> KeepBest:
    return KeepBest.parse(text(value))


@dataclass(frozen=True, kw_only=True)
class SavingOptions(Group):
    """Snapshots and checkpoints."""

    checkpoints: Location | None = option(_checkpoints, None)
    """Where checkpoints go: a directory, or a URL (s3, gs, az). None: ``checkpoints`` in the job directory."""
    checkpoint_bandwidth: float | None = option(parse_rate, None)
    """Bytes a second that writing checkpoints may take. None: no limit."""
    storage_timeout: float = option(seconds, TIMEOUT)
    """Seconds that an object store may take to answer a request."""
    snapshot_every: Interval = option(interval(), SNAPSHOT_EVERY)
    """How often the state is copied to host RAM."""
    checkpoint_every: Interval = option(interval(auto=True), CHECKPOINT_EVERY)
    """How often a snapshot is made durable. ``auto`` weighs the measured cost against the measured failure rate."""
    keep_last: int = option(whole, 3)
    """Keep this many of the newest checkpoints, at least 1."""
    keep_every: int | None = option(whole, None)
    """Also keep those at a multiple of this many steps."""
    keep_best: KeepBest | None = option(_keep_best, None)
    """Also keep the best by a metric that the Session logs: ``METRIC:min|max:M``."""

    def __post_init__(self) -> None:
        _ = self.retention  # what it refuses, it refuses in its own words
        if not 0 < self.storage_timeout < math.inf:
            raise ConfigError(f"--storage-timeout {self.storage_timeout:g}s: longer than 0")
        if self.snapshot_every.is_auto:
            raise ConfigError("--snapshot-every auto: only --checkpoint-every can be auto")
        if self.checkpoint_every.is_never:
            for rule in ("keep_every", "keep_best"):
                if getattr(self, rule) is not None:
                    raise ConfigError(f"{flag(rule)} has nothing to keep with --checkpoint-every never")
        if self.snapshot_every != SNAPSHOT_EVERY and _is_shorter(self.checkpoint_every, self.snapshot_every):
            raise ConfigError(
                f"--checkpoint-every {self.checkpoint_every} contradicts --snapshot-every {self.snapshot_every}: "
                "a checkpoint is a snapshot made durable, so there cannot be more of them"
            )
        super().__post_init__()

    @property
    def save_every(self) -> tuple[int, ...]:
        """Numbers of steps whose multiples are save points: every rank knows them by itself."""
        every = (self.snapshot_every.steps, self.checkpoint_every.steps)
        return tuple(steps for steps in every if steps is not None)

    @property
    def retention(self) -> RetentionPolicy:
        """Which checkpoints to keep."""
        return RetentionPolicy(keep_last=self.keep_last, keep_every=self.keep_every, keep_best=self.keep_best)


def _is_shorter(one: Interval, other: Interval) -> bool:
    """Whether ``one`` comes more often; intervals of different units cannot be compared."""
    return one.unit is other.unit and one.unit in (Unit.STEPS, Unit.SECONDS) and one.value < other.value
