"""The user's command, understood: which interpreter runs which script, and how an attempt is started from it.

``everstep run [options] COMMAND`` where COMMAND is one of ``ALLOWED``. An attempt is the same command with two small files
of ours in it, both named by absolute path so that nothing in the user's directory can take their place:
``launch/agent.py`` in front of torchrun and ``launch/worker`` in front of the user's script.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import torchrun
from launch.torchrun import Form, Torchrun
from supervisor.errors import UsageError
from supervisor.program import Rendezvous

AGENT = str(Path(__file__).with_name("agent.py").absolute())
WORKER = str(Path(__file__).with_name("worker").absolute())
ALLOWED = (
    "torchrun [options] SCRIPT | python -m torch.distributed.run [options] SCRIPT | "
    "python [options] script.py | python [options] -m module"
)

#: Python's one-letter options that take no value and change nothing in how a script is found
_SWITCHES = frozenset("bBdEIOPqRsSuv")
_LONG_WITH_VALUE = "--check-hash-based-pycs"


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to run in each worker, and by what. ``launcher`` None: a plain Python program, one worker."""

    command: tuple[str, ...]  # as the user typed it
    interpreter: str  # absolute path; not resolved: a virtual environment is found by its link
    flags: tuple[str, ...]  # of the interpreter
    form: Form
    target: str  # script, module or command
    arguments: tuple[str, ...]
    launcher: Torchrun | None = None
    launcher_path: str | None = None  # sys.argv[0] of torchrun; None: started as a module

    @property
    def name(self) -> str:
        """Short name for the default job directory: ``train`` for ``src/train.py`` and for ``-m pkg.train``."""
        if self.form is Form.MODULE:
            return self.target.rpartition(".")[2]
        path = Path(os.path.abspath(self.target))
        return path.stem or path.name

    @property
    def identity(self) -> str:
        """What may not change from run to run of one job, wherever it is run from: the script's real path, or the module."""
        if self.form is Form.MODULE:
            return f"-m {self.target}"
        if self.form is Form.COMMAND and os.sep not in self.target:
            return self.target
        return os.path.realpath(self.target)

    @property
    def launcher_folder(self) -> str:
        """What ``sys.path`` begins with in torchrun itself."""
        return os.path.dirname(os.path.realpath(self.launcher_path)) if self.launcher_path else os.getcwd()

    @property
    def notices(self) -> tuple[str, ...]:
        """What everstep does otherwise than the command says, each one line."""
        return self.launcher.notices if self.launcher else ()

    @property
    def has_ranks(self) -> bool:
        """Whether torchrun starts it, so that lines are told apart by rank."""
        return self.launcher is not None

    @property
    def environment(self) -> dict[str, str]:
        """What the worker boot must be told of this program, beside what every worker gets."""
        launcher = self.launcher
        return {
            "EVERSTEP_REDIRECT": "0" if launcher and launcher.redirects else "1",
            "EVERSTEP_VIRTUAL_LOCAL_RANK": "1" if launcher and launcher.virtual_local_rank else "0",
        }

    def attempt_argv(self, meeting: Rendezvous) -> list[str]:
        """The command line of one attempt, to be started by this very process (the agent checks its parent).

        Its rendezvous is static: on the first node, a fresh store will listen at the port.
        """
        worker = [WORKER, self.form.value, self.target, *self.arguments]
        if self.form is Form.RUN_PATH:  # the first entry of sys.path stays torchrun's
            worker.insert(2, self.launcher_folder)
        if self.launcher is None:
            unbuffered = (
                [] if any(_has_switch(flag, "u") for flag in self.flags) else ["-u"]
            )  # as torchrun does
            return [self.interpreter, *unbuffered, *self.flags, *worker]
        return [
            self.interpreter,
            *self.flags,
            AGENT,
            str(os.getpid()),
            self.launcher_path or "",
            f"--nnodes={meeting.nodes}",
            f"--node-rank={meeting.node_rank}",
            "--rdzv-backend=static",
            f"--master-addr={meeting.address}",
            f"--master-port={meeting.port}",
            "--max-restarts=0",
            *self.launcher.options,
            *worker,
        ]


def parse(command: Sequence[str], environ: Mapping[str, str] = os.environ) -> Program:
    """Understand the user's command. Raises UsageError with one line that says what is allowed."""
    if not command:
        raise UsageError(f"no program given; allowed: everstep run [options] {ALLOWED}")
    head = command[0]
    if torchrun.is_python(head):
        return _parse_python(command, environ)
    if Path(head).name == "torchrun":
        return _parse_console_script(command, _executable(head), [], command[1:], environ)
    if head.endswith(".py"):
        raise UsageError(f"{head} is a script, not a program: write `python {head}` or `torchrun {head}`")
    raise UsageError(f"cannot run {head!r}; allowed: {ALLOWED}")


# --------------------------------------------------------------------------- python …


def _parse_python(command: Sequence[str], environ: Mapping[str, str]) -> Program:
    interpreter = os.path.abspath(_executable(command[0]))
    flags, module, rest = _split_python(command[1:])
    if module is not None:
        if module == "torch.distributed.run":
            return _torchrun_program(command, interpreter, flags, rest, None, environ)
        if module == "torch.distributed.launch":
            raise UsageError("torch.distributed.launch is deprecated: use torchrun")
        return Program(
            command=tuple(command),
            interpreter=interpreter,
            flags=tuple(flags),
            form=Form.MODULE,
            target=module,
            arguments=tuple(rest),
        )
    if not rest:
        raise UsageError(f"{command[0]}: no script given; allowed: {ALLOWED}")
    if rest[0] == "-":
        raise UsageError(
            f"{command[0]} -: a program on standard input cannot be started again; put it in a file"
        )
    if Path(rest[0]).name == "torchrun":
        return _parse_console_script(command, rest[0], [interpreter, *flags], rest[1:], environ)
    _check_script(rest[0])
    return Program(
        command=tuple(command),
        interpreter=interpreter,
        flags=tuple(flags),
        form=Form.SCRIPT,
        target=rest[0],
        arguments=tuple(rest[1:]),
    )


def _split_python(words: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Part the interpreter's own flags from ``-m module`` (or None) and the rest, as Python's getopt does."""
    flags: list[str] = []
    index = 0
    while index < len(words) and words[index].startswith("-") and words[index] != "-":
        word = words[index]
        index += 1
        if word == "--":
            break
        if word == _LONG_WITH_VALUE:
            flags += [word, *words[index : index + 1]]
            index += 1
            continue
        for at, letter in enumerate(word[1:], start=1):
            if letter in _SWITCHES:
                continue
            if letter not in "WXm":
                raise UsageError(_refusal(word, letter))
            value = [word[at + 1 :]] if word[at + 1 :] else list(words[index : index + 1])
            if not value:
                raise UsageError(f"python: -{letter} needs {'a module' if letter == 'm' else 'a value'}")
            index += not word[at + 1 :]
            if letter == "m":
                return flags + [word[:at]] * (at > 1), _module_name(value[0]), list(words[index:])
            flags += [word] if word[at + 1 :] else [word, *value]
            break
        else:
            flags.append(word)
    return flags, None, list(words[index:])


def _refusal(word: str, letter: str) -> str:
    if letter == "c":
        return "python -c: code on the command line cannot be supervised; put it in a script"
    return f"python: option {word} is not supported under everstep; allowed: {ALLOWED}"


def _module_name(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"python -m {name}: not a module's name")
    return name


def _has_switch(flag: str, letter: str) -> bool:
    return flag.startswith("-") and not flag.startswith(("--", "-W", "-X")) and letter in flag


# --------------------------------------------------------------------------- torchrun …


def _parse_console_script(
    command: Sequence[str],
    script: str,
    interpreter: Sequence[str],
    words: Sequence[str],
    environ: Mapping[str, str],
) -> Program:
    script = os.path.abspath(script)
    by, *flags = interpreter or torchrun.interpreter_of(Path(script))
    return _torchrun_program(command, by, flags, words, script, environ)


def _torchrun_program(
    command: Sequence[str],
    interpreter: str,
    flags: Sequence[str],
    words: Sequence[str],
    path: str | None,
    environ: Mapping[str, str],
) -> Program:
    line = torchrun.parse(words, environ)
    if line.form is Form.COMMAND:
        _executable(line.target)
    elif line.form is Form.MODULE:
        _module_name(line.target)
    else:
        _check_script(line.target)
    return Program(
        command=tuple(command),
        interpreter=interpreter,
        flags=tuple(flags),
        form=line.form,
        target=line.target,
        arguments=line.arguments,
        launcher=line,
        launcher_path=path,
    )


def _executable(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        where = "does not exist or is not executable" if os.sep in name else "is not on PATH"
        raise UsageError(f"{name} {where}")
    return found


def _check_script(path: str) -> None:
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "__main__.py")):
        raise UsageError(f"{path} is a directory without __main__.py, not a script")
    if not os.path.exists(path):
        raise UsageError(f"script {path} does not exist (in {os.getcwd()})")
    if not os.access(path, os.R_OK):
        raise UsageError(f"script {path} cannot be read")
