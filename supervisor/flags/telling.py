"""What is told of the run, and to whom."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from supervisor.decide.telling import Hook, hooks
from supervisor.errors import ConfigError
from supervisor.flags.reading import Group, at_least, option, switch, text


def _port(value: object) -> int:
    """A port, or 0 for any that is free."""
    digits = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[0-9]{1,5}", digits) or int(digits) > 65535:
        raise ConfigError(f"{value!r} is no port; allowed: 0 (any that is free) to 65535")
    return int(digits)


def _metrics_file(value: object) -> Path:
    """A file that node_exporter would read."""
    if not isinstance(value, str | Path) or Path(value).suffix != ".prom":
        raise ConfigError(f"{value!r}: a name ending in .prom is required (node_exporter reads no others)")
    return Path(value).expanduser()


@dataclass(frozen=True, kw_only=True)
class TellingOptions(Group):
    """Hooks, metrics, and what is printed."""

    hook: tuple[Hook, ...] = option(hooks, ())
    """Who is told of events: commands and webhooks (``decide/telling.py``)."""
    hook_timeout: float = option(at_least(1), 10.0)
    """Seconds that a hook may take to be told one event."""
    metrics_port: int | None = option(_port, None)
    """Port of a Prometheus endpoint; 0: any that is free. None: there is none."""
    metrics_address: str = option(text, "127.0.0.1")
    """The address that the endpoint listens on."""
    metrics_file: Path | None = option(_metrics_file, None)
    """A file of metrics for node_exporter's textfile collector, ending in ``.prom``."""
    otel: bool = option(switch, False)
    """Send the run and its attempts as OpenTelemetry spans, to where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says."""
    quiet: bool = option(switch, False)
    """Print everstep's own messages only, not the workers' output (which is in the logs)."""
