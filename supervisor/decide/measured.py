"""What a job's own journal says of its costs and failures: what ``simulate`` needs to know of a cluster.

Medians, because the first time of anything is slower than the rest. The cost of snapshots is the measured stall of one, and
their interval the one with which the stalls sum to what the job's account has of them: snapshots are taken more often than
they are journaled.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from supervisor.decide import lifecycle
from supervisor.decide.scenario import Blow, Costs
from supervisor.errors import ProtocolError
from supervisor.model import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    Fact,
    Failure,
    FailureKind,
    FirstStep,
    Resumed,
    RunStarted,
    SnapshotCompleted,
    StandbyReady,
    StopCause,
    StopRequested,
    Tier,
)
from supervisor.record import JobRecord
from supervisor.timesheet import Activity

_BLOWS: Final = {FailureKind.HANG: Blow.HANG, FailureKind.NODE_LOST: Blow.NODE}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """``costs``: seconds by the names of ``simulation.Costs``, where they were seen."""

    record: JobRecord
    costs: dict[str, float]
    mtbf: float | None  # supervised seconds per failure or preemption; None: there was none
    blows: dict[Blow, int]  # how often what struck
    snapshot_every: float | None
    checkpoint_every: float | None


@dataclass
class _Seen:
    record: JobRecord = lifecycle.NEW_JOB
    samples: dict[str, list[float]] = field(default_factory=dict)
    blows: Counter[Blow] = field(default_factory=Counter)
    launched: float | None = None
    by_standby: bool = False
    tier: Tier | None = None
    detection: float = 0.0  # the account's, when the attempt began
    committed: float | None = None  # when the newest checkpoint of this attempt was

    def note(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(max(0.0, seconds))


def measure(facts: Iterable[Fact]) -> Measured:
    """From the facts of a journal, in order; those that cannot have happened are passed over."""
    seen = _Seen()
    for fact in facts:
        before = seen.record
        try:
            seen.record = lifecycle.apply(before, fact)
        except ProtocolError:
            continue
        _look(seen, before, fact)
    return _summed(seen)


def _look(seen: _Seen, before: JobRecord, fact: Fact) -> None:
    match fact:
        case RunStarted() if before.last_time is not None and before.activity is Activity.STOPPED:
            seen.note("away", fact.time - before.last_time)
        case AttemptStarted():
            seen.launched, seen.by_standby, seen.tier = fact.time, fact.standby, None
            seen.detection, seen.committed = seen.record.spent.detection, None
        case Resumed():
            seen.tier = fact.tier
        case FirstStep() if seen.launched is not None:
            launch = "relaunch" if seen.by_standby else "startup"
            seen.note(launch, fact.time - seen.launched - fact.restore_seconds)
            if seen.tier is not None:
                seen.note("restore" if seen.tier is Tier.RAM else "fetch", fact.restore_seconds)
        case SnapshotCompleted():
            seen.note("stall", fact.seconds)
        case StandbyReady() if before.attempt_first_time is not None:
            seen.note("standby", fact.time - before.attempt_first_time)
        case CheckpointCommitted():
            seen.note("drain", fact.seconds)
            if seen.committed is not None:
                seen.note("checkpoint_every", fact.time - seen.committed)
            seen.committed = fact.time
        case StopRequested(cause=StopCause.PREEMPTION):
            seen.blows[Blow.PREEMPTION] += 1
        case AttemptEnded(failure=Failure() as failure):
            blow = _BLOWS.get(failure.kind, Blow.PROCESS)
            seen.blows[blow] += 1
            if before.attempt_first_time is not None:
                noticed = fact.noticed if fact.noticed is not None else fact.time
                name = "hang_detection" if blow is Blow.HANG else "detection"
                seen.note(name, seen.record.spent.detection - seen.detection)
                seen.note("teardown", fact.time - noticed)


def _summed(seen: _Seen) -> Measured:
    record, medians = seen.record, {name: statistics.median(all_) for name, all_ in seen.samples.items()}
    spent = record.spent
    steps = record.furthest_step + record.lost_steps
    if steps and spent.productive:
        medians["step"] = (spent.productive + spent.redone) / steps
    every = medians.pop("checkpoint_every", None)
    worked, stall = spent.productive + spent.redone, medians.get("stall")
    struck = sum(seen.blows.values())
    return Measured(
        record=record,
        costs={name: value for name, value in medians.items() if name in Costs.__dataclass_fields__},
        mtbf=spent.supervised / struck if struck else None,
        blows=dict(seen.blows),
        snapshot_every=worked * stall / spent.snapshot if stall and spent.snapshot else None,
        checkpoint_every=every,
    )
