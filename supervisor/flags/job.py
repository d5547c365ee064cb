"""Which job it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from supervisor.errors import ConfigError
from supervisor.flags.reading import Group, option, path, switch, text


@dataclass(frozen=True, kw_only=True)
class JobOptions(Group):
    """The job and its directory."""

    dir: Path | None = option(path, None)
    """The job directory. None: ``everstep-runs/<name>``, under SLURM ``<name>-<job id>``; filled in by the command line."""
    name: str | None = option(text, None)
    """The job's name. None: the script's."""
    continue_: bool = option(switch, False)
    """Run a finished job on."""
    config: Path | None = None
    """The file that options were read from."""

    def __post_init__(self) -> None:
        if self.name is not None and (not self.name or self.name in (".", "..") or "/" in self.name):
            raise ConfigError(f"--name {self.name!r}: a plain name without slashes is required")
        super().__post_init__()
