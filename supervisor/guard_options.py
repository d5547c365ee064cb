"""How the options of the numeric guard are read, where a plain text or a whole number is not all that is allowed."""

from __future__ import annotations

from supervisor.errors import ConfigError
from supervisor.intervals import Interval


def mode(value: object) -> str:
    """``off`` (which YAML reads as false) or the name of a mode, which the policy checks."""
    if value is False:
        return "off"
    if isinstance(value, str):
        return value.strip().lower()
    raise ConfigError(f"{value!r}; allowed: off, nan, spike")


def factor(value: object) -> float:
    """A number."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ConfigError(f"{value!r} is no number")


def steps(value: object) -> int:
    """A number of steps with its unit; 0 for ``off``."""
    if value is False or (isinstance(value, str) and value.strip().lower() == "off"):
        return 0
    try:
        found = Interval.parse(value).steps if isinstance(value, str) else None
    except ConfigError:
        found = None
    if found is None:
        raise ConfigError(f"{value!r} is no number of steps; allowed: off, 1step, 50steps")
    return found
