"""Amounts of bytes as people write them: ``500KB``, ``1.5GB``; a second, where it is a rate."""

from __future__ import annotations

import re
from typing import Final

from supervisor.errors import ConfigError

_AMOUNT: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?B)(/s)?", re.IGNORECASE)
_BYTES: Final = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9}


def parse_rate(value: object) -> float:
    """Bytes a second, more than 0. Raises ConfigError."""
    found = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found or float(found[1]) == 0:
        raise ConfigError(f"{value!r} is no bandwidth; allowed: 500KB, 200MB, 1.5GB (a second)")
    return float(found[1]) * _BYTES[found[2].upper()]


def parse_size(value: object) -> int:
    """Bytes of memory. Raises ConfigError."""
    found = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found or found[3]:
        raise ConfigError(f"{value!r} is no amount of memory; allowed: 500MB, 2GB, 0B")
    return int(float(found[1]) * _BYTES[found[2].upper()])
