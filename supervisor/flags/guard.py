"""The numeric guard."""

from __future__ import annotations

from dataclasses import dataclass

from supervisor.decide.guard import GuardPolicy
from supervisor.errors import ConfigError
from supervisor.flags.reading import Group, number, option, text, whole
from supervisor.intervals import Interval


def _mode(value: object) -> str:
    """``off`` (which YAML reads as false) or the name of a mode, which the policy checks."""
    if value is False:
        return "off"
    if isinstance(value, str):
        return value.strip().lower()
    raise ConfigError(f"{value!r}; allowed: off, nan, spike")


def _steps(value: object) -> int:
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


@dataclass(frozen=True, kw_only=True)
class GuardOptions(Group):
    """What numbers are watched, and what follows."""

    guard: str = option(_mode, "off")
    """Roll back when the logged loss is not finite (``nan``), or also when it jumps (``spike``); else ``off``."""
    guard_loss: str = option(text, "loss")
    """The name under which the loss is logged."""
    guard_norm: str = option(text, "grad_norm")
    """The name under which the norm of the gradients is logged."""
    guard_factor: float = option(number, 10.0)
    """A loss is a spike when it lies so many mean absolute deviations above its mean …"""
    guard_patience: int = option(whole, 3)
    """… for so many logged steps in a row."""
    guard_skip: int = option(_steps, 0)
    """Steps to leave out after a rollback, with their data, up to the one that showed the trouble. 0: none."""
    guard_times: int = option(whole, 3)
    """Rollbacks that do not get past the trouble; then give up, or accept the new level of a loss that jumped."""
    guard_back: int = option(whole, 1)
    """How many checkpoints further back each repetition goes."""

    def __post_init__(self) -> None:
        _ = self.guard_policy  # what it refuses, it refuses in its own words
        super().__post_init__()

    @property
    def guard_policy(self) -> GuardPolicy:
        """What is watched, and what follows."""
        return GuardPolicy(
            mode=self.guard, loss=self.guard_loss, norm=self.guard_norm, factor=self.guard_factor,
            patience=self.guard_patience, skip=self.guard_skip, times=self.guard_times, back=self.guard_back,
        )  # fmt: skip
