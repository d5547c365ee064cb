"""What a job's time went into: every second of it is put down once, so the entries sum to its wall time."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Activity(enum.StrEnum):
    """What a second was spent on; the rules are in ``decide/goodput.py``."""

    PRODUCTIVE = "productive"  # steps that still count
    REDONE = "redone"  # steps whose outcome was lost, so that they were done again
    SNAPSHOT = "snapshot"  # the training stood still for a copy of its state
    STARTUP = "startup"  # launch, imports, the first step
    DETECTION = "detection"  # from the last step to the moment the failure was noticed
    TEARDOWN = "teardown"  # clearing away, and the last save before a stop
    RESTORE = "restore"  # reading the state back
    STOPPED = "stopped"  # no supervisor, or a pause before the next attempt


@dataclass(frozen=True)
class Timesheet:
    """Seconds by activity."""

    productive: float = 0.0
    redone: float = 0.0
    snapshot: float = 0.0
    startup: float = 0.0
    detection: float = 0.0
    teardown: float = 0.0
    restore: float = 0.0
    stopped: float = 0.0

    @property
    def total(self) -> float:
        """Wall time since the job's first fact."""
        return float(sum(self.__dict__.values()))

    @property
    def supervised(self) -> float:
        """Wall time less that in which nothing was meant to run."""
        return self.total - self.stopped

    @property
    def goodput(self) -> float:
        """Productive over supervised seconds, in [0, 1]; 0 before any time has passed."""
        return min(1.0, self.productive / self.supervised) if self.supervised > 0 else 0.0

    def spent(self, activity: Activity, seconds: float) -> Timesheet:
        """With ``seconds`` more of ``activity``."""
        sheet = object.__new__(Timesheet)  # as JobRecord.with_: a journal can hold 100 000 facts
        sheet.__dict__.update(self.__dict__)
        sheet.__dict__[activity.value] += seconds
        return sheet

    def moved(self, seconds: float, source: Activity, target: Activity) -> Timesheet:
        """With up to ``seconds`` (and no more than there are) of ``source`` put down as ``target`` instead."""
        seconds = max(0.0, min(seconds, self.__dict__[source.value]))
        return self.spent(source, -seconds).spent(target, seconds)
