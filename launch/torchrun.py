"""torchrun's own command line, read without torch: what the user asked of it, and what everstep must own instead.

Every attempt is a fresh torchrun with a rendezvous of its own, so the rendezvous, the restarts and the signals are
everstep's to set; all else is the user's and is handed on as it was given. The parser mirrors torchrun's (torch 2.11 to
2.15): argparse with the same names, so that abbreviations, underscores and the place where the script's own
arguments begin are understood as torchrun would. Its ``PET_*`` variables are looked at only where they decide
something here, and are otherwise left to torchrun. An option of a newer torchrun can be given as ``--name=value``.
"""

from __future__ import annotations

import argparse
import enum
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from supervisor.errors import UsageError


class Form(enum.StrEnum):
    """How the user named what to run in every worker."""

    SCRIPT = "script"  # script.py
    MODULE = "module"  # -m name
    COMMAND = "command"  # --no-python cmd
    RUN_PATH = "run-path"  # --run-path /abs/script.py: a script that is not put on sys.path


@dataclass(frozen=True, kw_only=True)
class Torchrun:
    """A torchrun line, taken apart."""

    form: Form
    target: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]  # handed on, in torchrun's spelling
    redirects: bool  # torchrun itself writes the workers' output to files
    virtual_local_rank: bool  # every worker is told LOCAL_RANK=0
    nodes: Nodes
    notices: tuple[str, ...]  # what everstep took over, each one line


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """What the line says of nodes, as text."""

    count: str | None = None
    rank: str | None = None
    endpoint: str | None = None  # host:port


@dataclass(frozen=True)
class _Option:
    """One of torchrun's options. ``takes`` False: a switch."""

    name: str
    short: str = ""
    takes: bool = True
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


_OWNED = (
    _Option("nnodes"),
    _Option("node-rank"),
    _Option("rdzv-backend"),
    _Option("rdzv-endpoint"),
    _Option("rdzv-id"),
    _Option("rdzv-conf"),
    _Option("standalone", takes=False),
    _Option("master-addr"),
    _Option("master-port"),
    _Option("max-restarts"),
    _Option("signals-to-handle"),
)
_FORMS = (
    _Option("module", short="-m", takes=False),
    _Option("no-python", takes=False),
    _Option("run-path", takes=False),
)
_KEPT = (
    _Option("nproc-per-node"),
    _Option("monitor-interval"),
    _Option("start-method", choices=("spawn", "fork", "forkserver")),
    _Option("event-log-handler"),
    _Option("role"),
    _Option("log-dir"),
    _Option("redirects", short="-r"),
    _Option("tee", short="-t"),
    _Option("log-line-prefix-template"),
    _Option("local-ranks-filter"),
    _Option("duplicate-stdout-filters"),
    _Option("duplicate-stderr-filters"),
    _Option("local-addr"),
    _Option("logs-specs"),
    _Option("numa-binding"),
    _Option("shutdown-timeout"),
    _Option("virtual-local-rank", takes=False),
)
_ALONE = (_Option("help", short="-h", takes=False), _Option("print-completion"))  # torchrun runs nothing then
DEFAULT_PORT = 29400  # torchrun's for a rendezvous
_OUTPUT = ("redirects", "tee", "logs-specs")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "arguments are required" in message:
            message = "no script given: torchrun [options] script.py | -m module | --no-python command"
        raise UsageError(f"torchrun: {message}")


class _RunsNothing(argparse.Action):
    """What torchrun does at once, and then ends."""

    def __call__(self, *_: object) -> NoReturn:
        name = next(name for name in self.option_strings if name.startswith("--"))
        raise UsageError(
            f"`torchrun {name}` runs nothing: give it to torchrun itself; everstep's own options are told by `everstep run --help`"
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="torchrun", argument_default=argparse.SUPPRESS, add_help=False)
    for option in _OWNED + _FORMS + _KEPT + _ALONE:
        # as torchrun registers them: the short form, then dashes, then underscores
        names = [option.short] * bool(option.short) + [f"--{option.name}"]
        if "-" in option.name:
            names.append(f"--{option.key}")
        if option in _ALONE:
            parser.add_argument(
                *names, dest=option.key, action=_RunsNothing, nargs=None if option.takes else 0
            )
        elif option.takes:
            parser.add_argument(*names, dest=option.key, choices=option.choices or None)
        else:
            parser.add_argument(*names, dest=option.key, action="store_true")
    parser.add_argument("training_script")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER)
    return parser


def parse(words: Sequence[str], environ: Mapping[str, str]) -> Torchrun:
    """Take apart what follows ``torchrun``. Raises UsageError with one line.

    Values that only torchrun can judge (``--nproc-per-node``, ``--role``, …) are left to torchrun.
    """
    known, unknown = _parser().parse_known_args(list(words))
    given: dict[str, object] = vars(known)
    odd = [word for word in unknown if not (word.startswith("--") and "=" in word)]
    if odd:
        raise UsageError(
            f"torchrun: unknown option {odd[0]}; one of a newer torchrun is handed on when written --name=value"
        )
    arguments: list[str] = known.training_script_args
    return Torchrun(
        form=_form(given, environ),
        target=known.training_script,
        arguments=tuple(arguments),
        options=tuple(_rendered(given)) + tuple(unknown),
        redirects=any(_effective(_by_name(name), given, environ) not in (None, "", "0") for name in _OUTPUT),
        virtual_local_rank=_effective(_by_name("virtual-local-rank"), given, environ) is not None,
        nodes=_nodes(given, environ),
        notices=tuple(_notices(given, environ)),
    )


def _by_name(name: str) -> _Option:
    return next(option for option in _OWNED + _FORMS + _KEPT if option.name == name)


def _effective(option: _Option, given: Mapping[str, object], environ: Mapping[str, str]) -> str | None:
    """The value torchrun would use: the flag, else its variable; a switch is "1" when on. None: torchrun's default."""
    if option.key in given:
        return str(given[option.key]) if option.takes else "1"
    value = environ.get(f"PET_{option.key.upper()}")
    if value is None or option.takes:
        return value
    try:
        return "1" if int(value) else None
    except ValueError:
        raise UsageError(f"PET_{option.key.upper()}={value}: 0 or 1 is required") from None


def _form(given: Mapping[str, object], environ: Mapping[str, str]) -> Form:
    module, no_python, run_path = (_effective(option, given, environ) for option in _FORMS)
    if run_path:  # as in torchrun, it wins over the others
        return Form.RUN_PATH
    if no_python and module:
        raise UsageError("torchrun: --no-python and -m/--module exclude each other")
    return Form.COMMAND if no_python else Form.MODULE if module else Form.SCRIPT


def _nodes(given: Mapping[str, object], environ: Mapping[str, str]) -> Nodes:
    def said(name: str) -> str | None:
        return _effective(_by_name(name), given, environ) or None

    endpoint = said("rdzv-endpoint")
    if endpoint is None and (address := said("master-addr")) is not None:
        endpoint = f"{address}:{said('master-port') or DEFAULT_PORT}"
    elif endpoint is not None and not re.search(r":\d+$", endpoint):
        endpoint = f"{endpoint}:{DEFAULT_PORT}"
    return Nodes(count=said("nnodes"), rank=said("node-rank"), endpoint=endpoint)


def _rendered(given: Mapping[str, object]) -> list[str]:
    return [
        f"--{option.name}={given[option.key]}" if option.takes else f"--{option.name}"
        for option in _KEPT
        if option.key in given
    ]


def _notices(given: Mapping[str, object], environ: Mapping[str, str]) -> list[str]:
    """What the user asked for and everstep does in its own way."""

    def asked(name: str) -> bool:
        return _effective(_by_name(name), given, environ) is not None

    rendezvous = [
        f"--{option.name}"
        for option in _OWNED
        if option.name not in ("nnodes", "max-restarts", "signals-to-handle") and asked(option.name)
    ]
    notices = []
    if rendezvous:
        verb = "is" if len(rendezvous) == 1 else "are"
        notices.append(
            f"torchrun's {', '.join(rendezvous)} {verb} taken over: every attempt gets a fresh rendezvous"
        )
    if asked("max-restarts"):
        notices.append("torchrun's --max-restarts is taken over: everstep restarts, see --max-failures")
    if asked("signals-to-handle"):
        notices.append(
            "torchrun's --signals-to-handle is taken over: everstep handles signals for all workers"
        )
    return notices


# --------------------------------------------------------------------------- the interpreter behind a console script


def interpreter_of(script: Path) -> list[str]:
    """The Python (and its flags) that a console script such as ``torchrun`` is run by, from its first lines.

    Understands a plain ``#!``, ``/usr/bin/env``, and the ``/bin/sh`` trampoline that installers write for long paths.
    Raises UsageError for anything else.
    """
    try:
        with open(script, "rb") as file:
            head = file.read(4096).decode(errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"{script}: {error.strerror}") from None
    words = _shebang(head)
    if words and is_python(words[0]):
        found = shutil.which(words[0])
        if found is None:
            raise UsageError(f"{script}: its interpreter {words[0]} does not exist")
        return [os.path.abspath(found), *words[1:]]
    raise UsageError(
        f"{script} is no Python script, so its interpreter is not known: use `python -m torch.distributed.run` instead"
    )


def _shebang(head: Sequence[str]) -> list[str]:
    if not head or not head[0].startswith("#!"):
        return []
    words = head[0][2:].split()
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if word != "-S"]
    elif words and Path(words[0]).name == "sh" and len(head) > 1 and head[1].startswith("'''exec' "):
        try:
            words = shlex.split(head[1].removeprefix("'''exec' "))
        except ValueError:
            return []
        words = [word for word in words if word not in ("$0", "$@")]
    return words


def is_python(word: str) -> bool:
    """Whether a command is a Python interpreter, by its name."""
    return re.fullmatch(r"python(\d+(\.\d+)*)?t?|pypy3?(\.\d+)*", Path(word).name) is not None
