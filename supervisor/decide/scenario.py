"""What a simulation is given and what it comes to: what strikes, what things cost, what is to be run."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from supervisor.decide import interval
from supervisor.model import Limits
from supervisor.record import JobRecord


class Blow(enum.StrEnum):
    """What strikes."""

    PROCESS = "process"  # a rank or torchrun dies; the node, and the snapshots in its memory, stay
    HANG = "hang"  # nothing goes on, until that is noticed
    NODE = "node"  # a node is lost with its memory, and replaced
    PREEMPTION = "preemption"  # with enough notice for a save; the job is away for a while


@dataclass(frozen=True)
class Strike:
    """``time``: seconds since the job began."""

    time: float
    blow: Blow


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How long things take on the cluster in question, in seconds."""

    step: float
    stall: float = 0.002  # of the training, for one snapshot
    drain: float = interval.COST_PRIOR  # from a snapshot to a committed checkpoint
    startup: float = 60.0  # a cold launch up to the first step, without restoring
    relaunch: float = 0.2  # a launch by the standby, likewise
    standby: float = (
        30.0  # from an attempt's first step until the next one waits; a failure before that is a cold launch
    )
    detection: float = 0.05  # from a death to the moment it is noticed
    hang_detection: float = 120.0
    teardown: float = 0.05
    restore: float = 1.0  # from host memory
    fetch: float = 30.0  # from durable storage
    replacement: float = 300.0  # of a lost node, before the cold launch
    away: float = 3600.0  # after a preemption

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise ValueError(f"a step of {self.step:g} s: longer than 0")
        for name, value in self.__dict__.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} of {value:g} s is no time")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run and how. Intervals are seconds, None: never; ``checkpoint_every`` "auto": as measured."""

    seconds: float | None = None  # the run ends after this much wall time …
    steps: int | None = None  # … or after this many steps, whichever is first
    snapshot_every: float | None = 30.0
    checkpoint_every: float | str | None = "auto"
    peers: bool = False  # a lost node's snapshots are in another node's memory too
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.seconds is None and self.steps is None:
            raise ValueError("a run ends after a time or a number of steps: neither is given")
        for name in ("seconds", "steps", "snapshot_every", "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name} {value:g}: more than 0")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it went: ``record`` is the job as its journal tells it; ``seconds`` the wall time."""

    record: JobRecord
    seconds: float
    checkpoints: int

    @property
    def goodput(self) -> float:
        """Productive over supervised seconds, as in the status."""
        return self.record.spent.goodput

    @property
    def effective(self) -> float:
        """Productive over all seconds, those included in which the job was away or paused."""
        return self.record.spent.productive / self.seconds if self.seconds > 0 else 0.0
