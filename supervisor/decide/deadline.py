"""When to stop for a deadline that is known, and how long a stop may take. Pure; all times in seconds.

A job that is ended from outside (a time limit, a preemption with grace) is sent signals at ``end`` and is killed at
``kill``. Everything that a stop takes should fit before ``end``: the step that is under way, the agreed save, the drain to
durable storage, the workers' leave. What these took so far is measured, and doubled for the next time; before anything was
measured, the grace that the user allows is taken. Never more than a share of what was left when the deadline became known: a
short job must train for a part of its time, or it would be stopped and run again for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LEAST: Final = 10.0  # for what is never measured: the workers' leave, the teardown, the scheduler's answer
SAFETY: Final = 2.0  # on what is measured
LARGEST: Final = 0.75  # share of the time that was left, for what was measured
LARGEST_UNKNOWN: Final = 0.5  # … and for what was not
MARGIN: Final = 2.0  # before ``kill``: to write down why


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """Unix seconds: from ``end`` on the job is being ended, by ``kill`` nothing of it is left. ``source``: says who.

    ``node``: of several, the only one that is ended; None: all of the job is.
    """

    source: str
    end: float
    kill: float
    node: str | None = None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one save took, and what one step takes; None: not measured yet."""

    save: float | None = None
    step: float | None = None


def lead(costs: Costs, grace: float) -> float:
    """How long before a deadline the stop must begin."""
    if costs.save is None:
        return grace
    return LEAST + SAFETY * (costs.save + (costs.step or 0.0))


def stop_at(deadline: Deadline, known_at: float, costs: Costs, grace: float) -> float:
    """When to ask for the stop. ``known_at``: when this deadline was first heard of."""
    share = LARGEST if costs.save is not None else LARGEST_UNKNOWN
    return deadline.end - min(lead(costs, grace), share * max(0.0, deadline.end - known_at))


def patience(deadline: Deadline | None, began: float, costs: Costs, grace: float) -> float:
    """How long a stop that ``began`` then may take before everything is torn down.

    The grace, or longer where saving is known to take longer; in any case not beyond the time at which it all is killed.
    """
    if deadline is None:
        return grace
    return max(1.0, min(deadline.kill - MARGIN - began, max(grace, lead(costs, grace))))
