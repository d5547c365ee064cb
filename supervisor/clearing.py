"""Killing what is left of an attempt, until nothing is."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Final

from supervisor.edge import clock, processes
from supervisor.edge.link import ATTEMPT

PERIOD: Final = 0.002  # seconds between two looks
DEADLINE: Final = 60.0


def own_processes(run_id: str, attempt: int, launcher: int | None) -> set[int]:
    """What is surely of this attempt: all that is below its launcher, if that lives, and orphans that bear its number."""
    of_run = processes.descendants(run_id)
    found = {pid for pid in of_run if processes.bears(pid, f"{ATTEMPT}={attempt}")}
    return found if launcher is None else found | {launcher, *processes.below(launcher)}


async def clear(left: Callable[[], set[int]], killed: set[int] | None = None) -> list[int]:
    """Kill whatever is ``left``, and look again until nothing is; the pids that would not die.

    Collects all of our dead children, or only those that were ``killed``.
    """
    deadline = clock.monotonic() + DEADLINE

    def reap() -> None:
        if killed is None:
            processes.reap()
        else:
            processes.reap_these(killed)

    while pids := left():
        processes.send(pids, signal.SIGKILL)
        if killed is not None:
            killed |= pids
        if clock.monotonic() > deadline:
            return sorted(pids)
        await asyncio.sleep(PERIOD)
        reap()
    reap()
    return []
