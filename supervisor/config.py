"""Where the options of ``everstep run`` come from.

Flags win over the file (``--config``, else ``everstep.yaml`` in the current directory if there), the file wins over the
defaults. The file knows every option by its flag's name, with dashes or underscores. Whatever is wrong is a ConfigError
of one line that names the file and the key. What there is, and what is allowed: the groups in ``flags``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from supervisor import yaml_file
from supervisor.checkpoint.location import Location
from supervisor.errors import ConfigError
from supervisor.flags.failing import FailingOptions
from supervisor.flags.guard import GuardOptions
from supervisor.flags.job import JobOptions
from supervisor.flags.nodes import NodeOptions
from supervisor.flags.reading import Reader, flag, path, readers
from supervisor.flags.saving import SavingOptions
from supervisor.flags.telling import TellingOptions

DEFAULT_FILE: Final = "everstep.yaml"


@dataclass(frozen=True, kw_only=True)
class Options(JobOptions, SavingOptions, FailingOptions, GuardOptions, NodeOptions, TellingOptions):
    """All options of one ``everstep run``. Contradictions raise ConfigError."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            self.dir is not None
            and isinstance(self.checkpoints, Path)
            and self.dir.absolute() == self.checkpoints.absolute()
        ):
            raise ConfigError(
                f"--checkpoints {self.checkpoints} is the job directory itself: give a directory of its own"
            )

    @property
    def checkpoints_directory(self) -> Location:
        """Where checkpoints go, once ``dir`` is known."""
        if self.checkpoints is not None:
            return self.checkpoints
        if self.dir is None:
            raise ConfigError("neither the job directory nor the checkpoints' is known")
        return self.dir / "checkpoints"


#: how each option is read, by its field
READERS: Final[Mapping[str, Reader]] = readers(Options)


def load(flags: Mapping[str, object], directory: Path | None = None) -> Options:
    """Options from ``flags`` (field → text, absent where not given) and the configuration file.

    ``directory`` is where ``everstep.yaml`` is looked for (default: the current one). Raises ConfigError.
    """
    given = dict(flags)
    named = given.pop("config", None)
    file = path(named) if named is not None else (directory or Path()) / DEFAULT_FILE
    values: dict[str, Any] = {}
    try:
        is_there = named is not None or file.is_file()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    if is_there:
        values = read_file(file)
        values["config"] = file
    for name, value in given.items():
        values[name] = _read(name, value, flag(name))
    try:
        return Options(**values)
    except ConfigError as error:
        where = f"{file}: " if "config" in values and not given else ""
        raise ConfigError(f"{where}{error}") from None


def read_file(file: Path) -> dict[str, Any]:
    """The options in a YAML file, by field. Raises ConfigError naming the file and the key."""
    values: dict[str, Any] = {}
    for key, value in yaml_file.mapping(file).items():
        name = _field(key, file)
        if name in values:
            raise ConfigError(f"{file}: {flag(name)[2:]} is given twice")
        values[name] = _read(name, value, f"{file}: {key}")
    return values


def _read(name: str, value: object, where: str) -> object:
    try:
        return READERS[name](value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _field(key: object, file: Path) -> str:
    """The field of a key. ``continue`` is a keyword of Python, hence its underscore here."""
    name = str(key).replace("-", "_")
    if name == "continue":
        name = "continue_"
    elif name == "continue_" or name not in READERS:
        allowed = sorted(flag(known)[2:] for known in READERS)
        close = difflib.get_close_matches(str(key).replace("_", "-"), allowed, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{file}: unknown key {key!r}{guess}; allowed: {', '.join(allowed)}")
    return name
