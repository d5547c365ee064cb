"""SLURM's short way to write many host names, ``gpu[001-003,7],login1``, written out."""

from __future__ import annotations

import itertools
import re

from supervisor.errors import ConfigError

_LARGEST = 100_000  # hosts
_PART = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def expand(text: str) -> tuple[str, ...]:
    """Every host of a list, in its order: ``n[01-03],m1`` → n01, n02, n03, m1; several brackets in one name multiply.

    Raises ConfigError for what is no such list.
    """
    hosts: list[str] = []
    for word in _split(text):
        pieces = re.split(r"\[([^\[\]]*)\]", word)  # plain, bracket, plain, bracket, …, plain
        if any(character in piece for piece in pieces[::2] for character in "[]") or not word:
            raise ConfigError(f"{text!r} is no list of hosts")
        choices = [[piece] if index % 2 == 0 else _numbers(piece, text) for index, piece in enumerate(pieces)]
        hosts += ("".join(parts) for parts in itertools.product(*choices))
        if len(hosts) > _LARGEST:
            raise ConfigError(f"{text!r}: more than {_LARGEST} hosts")
    return tuple(hosts)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    return re.split(r",(?![^\[]*\])", text.strip())


def _numbers(inside: str, text: str) -> list[str]:
    """``01-03,7`` → 01, 02, 03, 7: as wide as the first number of a range."""
    numbers: list[str] = []
    for part in inside.split(","):
        found = _PART.fullmatch(part)
        if found is None:
            raise ConfigError(f"{text!r}: {part!r} is no number or range of numbers")
        first, last = found[1], found[2] or found[1]
        if not 0 <= int(last) - int(first) <= _LARGEST:
            raise ConfigError(f"{text!r}: {part!r} is no range of numbers")
        numbers += (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers
