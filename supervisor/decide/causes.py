"""The root cause of an attempt's end, of what all of its nodes say of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from supervisor.fleet import Ended
from supervisor.model import Failure, FailureKind


@dataclass(frozen=True, kw_only=True)
class Departed:
    """How an attempt ended on a node; ``ended`` None: the node was lost."""

    name: str
    ended: Ended | None


@dataclass(frozen=True, kw_only=True)
class Cause:
    """The first cause, the node that it lay on, and when it was noticed anywhere (Unix seconds)."""

    failure: Failure | None = None
    node: str | None = None
    noticed: float | None = None


def first_cause(departed: Sequence[Departed], *, attempt: int, lease: float, now: float) -> Cause:
    """No failure: every node has ended its part as it should. ``lease``: seconds of silence after which a node is lost."""
    found: list[tuple[int, float, Failure, str]] = []
    for one in departed:
        failure, noticed = _failure_of(one, attempt, lease, now)
        if failure is not None:
            found.append((_rank(failure), noticed, failure, one.name))
    if not found:
        return Cause()
    _, _, failure, node = min(found, key=lambda one: one[:2])
    return Cause(failure=failure, node=node, noticed=min(noticed for _, noticed, _, _ in found))


def unfinished(departed: Sequence[Departed], *, attempt: int, now: float) -> Failure | None:
    """Somebody has left an attempt that the others were still in, without a failure of its own."""
    for one in departed:
        if one.ended is not None and not one.ended.finished:
            reason = f"node {one.name} has left the attempt"
            return Failure(kind=FailureKind.NODE_LOST, reason=reason, attempt=attempt, time=now)
    return None


def _failure_of(one: Departed, attempt: int, lease: float, now: float) -> tuple[Failure | None, float]:
    if one.ended is None:
        reason = f"node {one.name} was lost: nothing was heard of it for {lease:g} s"
        return Failure(kind=FailureKind.NODE_LOST, reason=reason, attempt=attempt, time=now), now
    failure = one.ended.failure
    if failure is None:
        return None, now
    return replace(failure, reason=f"{failure.reason} (on {one.name})"), one.ended.noticed or failure.time


def _rank(failure: Failure) -> int:
    """A lost connection is an echo of whatever else there was; a node that is gone explains what follows from its silence."""
    match failure.kind:
        case FailureKind.COMMUNICATION:
            return 2
        case FailureKind.NODE_LOST | FailureKind.HANG:
            return 1
        case _:
            return 0
