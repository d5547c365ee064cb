"""How often, and how long: intervals in steps or seconds, and durations, as they are written in options."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from supervisor.errors import ConfigError

INTERVALS: Final = "1step, 50steps, 10s, 5m, 1h or never"
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])")
_STEPS: Final = re.compile(r"([0-9]+)\s*steps?")


class Unit(enum.StrEnum):
    """What an interval is counted in."""

    STEPS = "steps"
    SECONDS = "seconds"
    NEVER = "never"
    AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How often something happens. ``value`` is in steps or seconds, and 0 for ``never`` and ``auto``."""

    unit: Unit
    value: float = 0

    @property
    def steps(self) -> int | None:
        """The interval in steps, None when it is not counted in steps."""
        return int(self.value) if self.unit is Unit.STEPS else None

    @property
    def seconds(self) -> float | None:
        """The interval in seconds, None when it is not counted in seconds."""
        return self.value if self.unit is Unit.SECONDS else None

    @property
    def is_never(self) -> bool:
        """Whether it never happens."""
        return self.unit is Unit.NEVER

    @property
    def is_auto(self) -> bool:
        """Whether it is to be worked out from measurements."""
        return self.unit is Unit.AUTO

    def __str__(self) -> str:
        """As it would be written on the command line."""
        if self.unit is Unit.STEPS:
            return "1step" if self.value == 1 else f"{int(self.value)}steps"
        return f"{self.value:g}s" if self.unit is Unit.SECONDS else self.unit.value

    @classmethod
    def parse(cls, text: str, *, auto: bool = False) -> Interval:
        """From ``1step``, ``50steps``, ``10s``, ``5m``, ``1h``, ``never``, and where it is allowed ``auto``.

        Raises ConfigError.
        """
        word = text.strip().lower()
        if word == "never":
            return cls(unit=Unit.NEVER)
        if word == "auto" and auto:
            return cls(unit=Unit.AUTO)
        if found := _STEPS.fullmatch(word):
            interval = cls(unit=Unit.STEPS, value=int(found[1]))
        elif _DURATION.fullmatch(word):
            interval = cls(unit=Unit.SECONDS, value=parse_duration(word))
        else:
            allowed = f"auto, {INTERVALS}" if auto else INTERVALS
            raise ConfigError(f"{text!r} is no interval; allowed: {allowed}")
        if interval.value == 0:
            raise ConfigError(f"{text!r}: an interval must be longer than 0 (never switches it off)")
        return interval


def parse_duration(text: str) -> float:
    """Seconds in ``60s``, ``5m``, ``1.5h``, ``1d``. Raises ConfigError."""
    found = _DURATION.fullmatch(text.strip().lower())
    if not found:
        raise ConfigError(f"{text!r} is no duration; allowed: 60s, 5m, 1h")
    return float(found[1]) * _SECONDS[found[2]]
