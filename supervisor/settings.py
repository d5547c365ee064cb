"""The options of a run as words, as they go into the journal: for whoever reads later what it was run with.

Under a flag's name stands what could be given to that flag. What may hold a secret (a webhook's path and query) is left out.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from supervisor.config import Options
from supervisor.decide.retention import KeepBest

#: where they come from is no setting, and the rest the command line of the journal says
_LEFT_OUT: Final = frozenset({"config", "continue_", "otel", "quiet"})
_SECONDS: Final = frozenset(
    {
        "storage_timeout",
        "grace",
        "hang",
        "hang_startup",
        "hang_floor",
        "hang_ceiling",
        "hang_silence",
        "hook_timeout",
        "lease",
        "node_timeout",
    }
)


def described(options: Options) -> dict[str, str]:
    """Option (its flag without dashes in front) → value; options that were not given and have no default are left out."""
    found = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in _LEFT_OUT and value is not None and value != ():
            found[field.name.strip("_").replace("_", "-")] = _words(field.name, value)
    return found


def _words(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(_words(name, item) for item in value)
    if isinstance(value, KeepBest):
        return f"{value.metric}:{value.mode}:{value.count}"
    if isinstance(value, float):
        return (
            f"{value:g}s"
            if name in _SECONDS
            else f"{value / 1e6:g}MB"
            if name == "checkpoint_bandwidth"
            else f"{value:g}"
        )
    return str(value)
