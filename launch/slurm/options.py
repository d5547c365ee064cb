"""``sbatch``'s options, as far as they make sense for a job of everstep: read, checked by name, and put in one spelling."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final

from supervisor.errors import UsageError

#: options that take a value, by name; the letter that also means it
VALUED: Final[dict[str, str]] = {
    **dict.fromkeys(
        """acctg-freq bb bbf cluster-constraint comment container core-spec cores-per-socket cpu-freq cpus-per-gpu deadline
        delay-boot export export-file extra extra-node-info gpu-bind gpu-freq gpus-per-node gpus-per-socket gres gres-flags
        mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus nodefile power prefer priority profile qos
        reservation signal sockets-per-node stepmgr switches thread-spec threads-per-core time-min tmp tres-bind
        tres-per-task wckey""".split(),
        "",
    ),
    "account": "A", "array": "a", "begin": "b", "chdir": "D", "clusters": "M", "constraint": "C",
    "cpus-per-task": "c", "dependency": "d", "distribution": "m", "error": "e", "exclude": "x", "gpus": "G",
    "job-name": "J", "licenses": "L", "nodelist": "w", "nodes": "N", "output": "o", "partition": "p", "time": "t",
}  # fmt: skip
#: options that take none, or one after ``=`` only
SWITCHES: Final[dict[str, str]] = {
    **dict.fromkeys("contiguous exclusive nice propagate reboot spread-job use-min-nodes".split(), ""),
    "hold": "H", "no-kill": "k", "overcommit": "O", "oversubscribe": "s",
}  # fmt: skip
#: options that are not the user's to set here, and why
OWNED: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "ntasks-per-core", "ntasks-per-socket", "ntasks-per-gpu", "gpus-per-task"),
        "everstep is one task on each node, and torchrun starts its workers: say --nodes and --gpus-per-node",
    ),
    "requeue": "the job is requeued when its state is saved, in any case (--chain where that is forbidden)",
    "no-requeue": "say --chain: the job then submits its successor itself",
    "open-mode": "a requeued job's output is appended, in any case",
    "wrap": "the script is everstep's: put the command behind --",
    **dict.fromkeys(("parsable", "quiet", "test-only", "verbose", "wait"), "it is about submitting, not about the job"),
}  # fmt: skip
_LETTERS: Final = {letter: name for name, letter in {**VALUED, **SWITCHES}.items() if letter}
_OWNED_LETTERS: Final = {"n": "ntasks", "Q": "quiet", "W": "wait", "v": "verbose"}


def parse(words: Sequence[str]) -> dict[str, str | None]:
    """Name → value (None: a switch), in the order given. Raises UsageError naming what is wrong and what is allowed."""
    found: dict[str, str | None] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, value = _name(word)
        if name in OWNED:
            raise UsageError(f"{word}: {OWNED[name]}")
        if name in VALUED and value is None:
            if not rest:
                raise UsageError(f"{word}: a value is required")
            value = rest.pop(0)
        if value is not None and ("\n" in value or not value.strip()):
            raise UsageError(f"{word}: a value of one line is required")
        found[name] = value
    return found


def render(options: dict[str, str | None]) -> list[str]:
    """As ``#SBATCH`` lines take them; a value with blanks or quotes in it is quoted."""
    return [f"--{name}" if value is None else f"--{name}={_quoted(value)}" for name, value in options.items()]


def _name(word: str) -> tuple[str, str | None]:
    """The option that a word means, and the value within the word."""
    if word.startswith("--"):
        name, sign, value = word[2:].partition("=")
        if name in VALUED or name in SWITCHES or name in OWNED:
            return name, value if sign else None
        close = difflib.get_close_matches(name, [*VALUED, *SWITCHES], n=1)
        guess = f" (did you mean --{close[0]}?)" if close else ""
        allowed = ", ".join(f"--{known}" for known in sorted([*VALUED, *SWITCHES]))
        raise UsageError(f"unknown option --{name} of sbatch{guess}; allowed: {allowed}")
    letter, rest = word[1:2], word[2:]
    if letter in _OWNED_LETTERS:
        return _OWNED_LETTERS[letter], rest
    if not word.startswith("-") or letter not in _LETTERS or (rest and _LETTERS[letter] in SWITCHES):
        raise UsageError(f"{word!r} is no option of sbatch (the command to run comes behind --)")
    return _LETTERS[letter], rest or None


def _quoted(value: str) -> str:
    if not any(character in value for character in " \t\"'#\\"):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
