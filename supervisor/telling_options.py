"""How the options of metrics are read (those of hooks: ``decide/telling.py``)."""

from __future__ import annotations

import re
from pathlib import Path

from supervisor.errors import ConfigError


def port(value: object) -> int:
    """A port, or 0 for any that is free."""
    text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ConfigError(f"{value!r} is no port; allowed: 0 (any that is free) to 65535")
    return int(text)


def metrics_file(value: object) -> Path:
    """A file that node_exporter would read."""
    if not isinstance(value, str | Path) or Path(value).suffix != ".prom":
        raise ConfigError(f"{value!r}: a name ending in .prom is required (node_exporter reads no others)")
    return Path(value).expanduser()
