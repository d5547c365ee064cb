"""The only module that reads a clock; everything that decides is given ``now``."""

from __future__ import annotations

import time


def now() -> float:
    """Unix seconds: for the journal and for people."""
    return time.time()


def monotonic() -> float:
    """Seconds of CLOCK_MONOTONIC: orders the events of this node, shared by all its processes."""
    return time.monotonic()


def unix_of(monotonic_ns: int) -> float:
    """The Unix time of a CLOCK_MONOTONIC reading (nanoseconds) taken by any process of this node."""
    return time.time() - (time.monotonic_ns() - monotonic_ns) / 1e9


def pause(seconds: float) -> None:
    """Let ``seconds`` pass (milliseconds at most: it holds up the caller's loop)."""
    time.sleep(seconds)
