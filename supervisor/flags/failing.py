"""What counts as a failure, how many are borne, and how the job comes back or stops."""

from __future__ import annotations

import math
from dataclasses import dataclass

from supervisor.amounts import parse_size
from supervisor.errors import ConfigError
from supervisor.flags.reading import Group, at_least, flag, one_of, option, seconds, whole

_limit = at_least(1)


def _limit_or_never(value: object) -> float | None:
    return None if isinstance(value, str) and value.strip().lower() == "never" else _limit(value)


def _hang(value: object) -> float | str:
    if isinstance(value, bool):  # YAML reads on and off as these
        return "auto" if value else "off"
    if isinstance(value, str) and value.strip().lower() in ("auto", "off"):
        return value.strip().lower()
    try:
        return _limit(value)
    except ConfigError:
        raise ConfigError(
            f"{value!r}; allowed: auto, off, or a time of 1s or longer, such as 90s or 5m"
        ) from None


@dataclass(frozen=True, kw_only=True)
class FailingOptions(Group):
    """Failures, hangs, stops, and the standby."""

    max_failures: int = option(whole, 5)
    """Give up after this many failures without progress (newly committed steps) in between; 0: at the first."""
    max_preemptions: int = option(whole, 100)
    """Give up after this many preemptions without progress (newly committed steps) in between; 0: at the first."""
    grace: float = option(seconds, 60.0)
    """Seconds that a stop may take to save the state, before everything is killed."""
    hang: float | str = option(_hang, "auto")
    """When ranks that do not go on are taken to hang: ``auto`` (limits learned from the job's own steps), ``off``, or seconds
    that a step may take."""
    hang_startup: float | None = option(_limit, None)
    """Seconds up to an attempt's first step without a sign of life. None: 30 minutes, for a job that is known to make steps."""
    hang_floor: float | None = option(_limit, None)
    """No learned limit is shorter, in seconds. None: a minute with a Session, ten without, where a false alarm costs more."""
    hang_ceiling: float = option(_limit, 1800.0)
    """No learned limit is longer, in seconds; also the limit where nothing can be learned: evaluation, the first save."""
    hang_silence: float | None = option(_limit_or_never, None)
    """Seconds without any output, for programs whose steps cannot be seen. None: output does not matter."""
    standby: str = option(one_of("on", "off", "init"), "on")
    """Keep the next attempt launched and imported beside the current one: ``on`` or ``off``. ``init``: also run the script ahead, up to
    ``init_process_group``."""
    standby_memory: int | None = option(parse_size, None)
    """Bytes of memory that are to stay free: when less is available the standby is dropped. None: 5 % of all."""
    notices: str = option(one_of("auto", "aws", "gcp", "azure", "slurm", "none"), "auto")
    """Whose notices are watched: ``auto`` (this machine's cloud's), or no cloud's. Signals and deadlines are heeded in any case."""
    requeue: str = option(one_of("auto", "off"), "auto")
    """Under a scheduler, have a job that has saved for a stop run again: ``auto`` (where that is possible) or ``off``."""

    def __post_init__(self) -> None:
        for name in ("max_failures", "max_preemptions"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: at least 0")
        if not 0 < self.grace < math.inf:
            raise ConfigError(f"--grace {self.grace:g}s: longer than 0")
        if self.hang_floor is not None and self.hang_floor > self.hang_ceiling:
            raise ConfigError(
                f"--hang-floor {self.hang_floor:g}s is longer than --hang-ceiling {self.hang_ceiling:g}s"
            )
        super().__post_init__()
