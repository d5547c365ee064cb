"""The options about several nodes: how their texts are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from supervisor.decide.membership import Size
from supervisor.edge.store import address
from supervisor.edge.store.address import StoreAddress
from supervisor.errors import ConfigError
from supervisor.intervals import parse_duration

LEAST_LEASE: Final = 1.0  # seconds: shorter ones would run out on a busy machine


def nodes(value: object) -> Size:
    """``4``, or ``2:4`` for as many as there are between these."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*(?::\s*(\d{1,6})\s*)?", str(value))
    if match is None or isinstance(value, bool):
        raise ConfigError(f"{value!r}: a number of nodes, or MIN:MAX, is required")
    least = int(match[1])
    most = int(match[2]) if match[2] else least
    if not 1 <= least <= most:
        raise ConfigError(f"{value!r}: 1 <= MIN <= MAX is required")
    return Size(least=least, most=most)


def rank(value: object) -> int:
    """A node's rank."""
    if isinstance(value, bool) or not re.fullmatch(r"\s*\d{1,6}\s*", str(value)):
        raise ConfigError(f"{value!r}: a number from 0 on is required")
    return int(str(value))


def store(value: object) -> StoreAddress:
    """A store's URL."""
    return address.parse(str(value))


def lease(value: object) -> float:
    """Seconds until a silent node is taken for lost."""
    seconds = _seconds(value)
    if seconds < LEAST_LEASE:
        raise ConfigError(f"{seconds:g}s: {LEAST_LEASE:g}s or longer is required")
    return seconds


def name(value: object) -> str:
    """A node's name: a plain word, for it is part of file names."""
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise ConfigError(f"{text!r}: letters, digits, dots, dashes and underscores are allowed")
    return text


def _seconds(value: object) -> float:
    if isinstance(value, int | float):
        raise ConfigError(f"{value} has no unit; allowed: 60s, 5m, 1h")
    seconds = parse_duration(str(value))
    if seconds <= 0:
        raise ConfigError(f"{seconds:g}s: longer than 0")
    return seconds


#: by the options' fields
READERS: Final[Mapping[str, Callable[[object], object]]] = {
    "nnodes": nodes,
    "node_rank": rank,
    "node_name": name,
    "store": store,
    "lease": lease,
    "node_timeout": _seconds,
}
