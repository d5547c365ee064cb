"""How an option is declared, and how texts and YAML's values become what it holds. All readers raise ConfigError."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from supervisor.errors import ConfigError
from supervisor.intervals import INTERVALS, Interval, parse_duration

T = TypeVar("T")
Reader = Callable[[object], object]

_READ: Final = "read"  # key of a field's metadata


def option(read: Reader, default: T) -> T:
    """The field of a dataclass that ``read`` reads from a flag's text or a file's value."""
    found: Any = field(default=default, metadata={_READ: read})
    return found  # type: ignore[no-any-return]  # as dataclasses.field


def readers(options: type) -> Mapping[str, Reader]:
    """How each option of a dataclass is read, by its field."""
    known: tuple[Field[Any], ...] = fields(options)
    return {one.name: one.metadata[_READ] for one in known if _READ in one.metadata}


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.strip("_").replace("_", "-")


class Group:
    """A part of the options, a dataclass. Contradictions in it raise ConfigError."""

    def __post_init__(self) -> None:
        """Check this group, then the others."""


def shown(value: object) -> str:
    """A value that is none of those allowed."""
    return "nothing" if value is None else f"{value!r} (a {type(value).__name__})"


def text(value: object) -> str:
    """A text, which may be a path."""
    if not isinstance(value, str | Path):
        raise ConfigError(f"{shown(value)} is no text")
    return str(value)


def path(value: object) -> Path:
    """A path; ``~`` is the home directory."""
    name = text(value)
    if not name:
        raise ConfigError("a path is required, not an empty text")
    return Path(name).expanduser()


def whole(value: object) -> int:
    """A whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+", value.strip()):
        return int(value)
    raise ConfigError(f"{shown(value)} is no whole number")


def number(value: object) -> float:
    """A number."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ConfigError(f"{value!r} is no number")


def switch(value: object) -> bool:
    """Yes or no."""
    if not isinstance(value, bool):
        raise ConfigError(f"{shown(value)} is neither true nor false")
    return value


def one_of(*words: str) -> Callable[[object], str]:
    """One of these words; the first is what YAML's ``on`` stands for."""

    def read(value: object) -> str:
        if isinstance(value, bool):  # YAML reads on and off as these
            value = words[0] if value else "off"
        word = text(value).strip().lower()
        if word not in words:
            raise ConfigError(f"{word!r}; allowed: {', '.join(words)}")
        return word

    return read


def interval(*, auto: bool = False) -> Callable[[object], Interval]:
    """Steps or time; with ``auto`` that word, too."""

    def read(value: object) -> Interval:
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise ConfigError(f"{value} has no unit; allowed: {'auto, ' if auto else ''}{INTERVALS}")
        return Interval.parse(text(value), auto=auto)

    return read


def seconds(value: object) -> float:
    """A time with its unit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ConfigError(f"{value} has no unit; allowed: 60s, 5m, 1h")
    return parse_duration(text(value))


def at_least(least: float) -> Callable[[object], float]:
    """A time that is no shorter, in seconds."""

    def read(value: object) -> float:
        found = seconds(value)
        if found < least:
            raise ConfigError(f"{found:g}s: {least:g}s or longer is required")
        return found

    return read


def positive(value: object) -> float:
    """A time longer than 0, in seconds."""
    found = seconds(value)
    if found <= 0:
        raise ConfigError(f"{found:g}s: longer than 0")
    return found
