"""The command ``everstep``: words in, exit code out. Here, and only here, the parts are put together.

Everything is imported where it is used: ``everstep status`` need not wait for what ``everstep run`` needs, and nothing
here waits for torch. Errors meant for the user are one line on standard error and an exit code (README, exit codes).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch import asking, doctor, rehearse, reporting, serving, simulate, submit, telling, watching
from launch.finding import RUNS, find_job, find_jobs
from supervisor.errors import EverstepError, UsageError

if TYPE_CHECKING:
    from launch.program import Program
    from supervisor.config import Options

DEBUG = "EVERSTEP_DEBUG"
EXIT_BUG, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 70, 130, 141

RUN_USAGE = "everstep run [options] torchrun [torchrun's options] script.py …\n       everstep run [options] python script.py …"
RUN_TEXT = """\
Keeps a PyTorch training run going: starts it, snapshots its state, notices every way it can stop, and puts it back on
its feet. Run the same command again to carry on where the job stopped. Every option can also stand in everstep.yaml.
"""
RUN_END = """\
intervals: 1step, 50steps, 10s, 5m, 1h, never
exit codes: 0 finished, 75 state saved and to be run again, 130 stopped by the user (saved), 1 gave up (the last lines
say why), 64 wrong usage, 78 wrong configuration or job directory, 70 a bug of everstep
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong word is an exception with one line that says what was meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=True,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")

    def reject(self, unknown: Sequence[str]) -> None:
        """Raise UsageError for the first word that no option claimed."""
        if unknown:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            word = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(word, known, n=1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(f"unknown option {word}{guess}; allowed: {', '.join(sorted(known))}")


class _Version(argparse.Action):
    def __call__(self, *_: object) -> NoReturn:
        from supervisor.about import version

        print(f"everstep {version()}")
        sys.exit(0)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; exits with the command's code."""
    code = call(sys.argv[1:] if arguments is None else arguments)
    if "obstore" in sys.modules:
        # the threads of its runtime now and then abort a process whose interpreter is being taken apart under them
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def call(arguments: Sequence[str]) -> int:
    """Carry out one command line; returns its exit code."""
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except EverstepError as error:
        print(f"everstep: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone; Python's own flush at exit must not complain about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(f"everstep: unexpected {text} ({DEBUG}=1 shows where)", file=sys.stderr)
        return EXIT_BUG


def read(arguments: Sequence[str]) -> dict[str, Any]:
    """What a command line says, by name, the ``command`` itself included. Raises UsageError for any word that is unknown."""
    parser = _Parser(prog="everstep", description="Keeps a distributed PyTorch training run going.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    parsers = {"run": _run_parser(commands), "status": _status_parser(commands)}
    checkpoints = commands.add_parser(
        "checkpoints", help="list, verify, look into, compare, export or prune checkpoints"
    )
    parsers |= asking.add_parsers(checkpoints, _Parser, _add_job)
    parsers["rehearse"] = rehearse.add_parser(commands, _add_job)
    parsers["report"] = reporting.add_parser(commands, _add_job)
    parsers["serve"] = serving.add_parser(commands)
    parsers["submit"] = submit.add_parser(commands)
    parsers["doctor"] = doctor.add_parser(commands, _add_job)
    parsers["simulate"] = simulate.add_parser(commands)
    parsed, unknown = parser.parse_known_args(list(arguments))
    if parsed.command is None:
        parser.reject(unknown)
        parser.error(
            "no command given: run, status, report, serve, checkpoints, rehearse, submit, doctor or simulate"
        )
    parsers[parsed.action if parsed.command == "checkpoints" else parsed.command].reject(unknown)
    return vars(parsed)


def _dispatch(arguments: Sequence[str]) -> int:
    given = read(arguments)

    def job() -> Path:
        return find_job(given["dir"])

    answers: dict[str, Callable[[], int]] = {
        "run": lambda: _run(given),
        "status": lambda: _status(given, job()),
        "checkpoints": lambda: _checkpoints(given),
        "rehearse": lambda: rehearse.answer(given, job),
        "report": lambda: reporting.answer(given, job),
        "serve": lambda: serving.answer(given, find_jobs),
        "submit": lambda: submit.answer(given, _read_run),
        "doctor": lambda: doctor.answer(given, _flags(given), lambda: find_job(None)),
        "simulate": lambda: simulate.answer(given),
    }
    return answers[given["command"]]()


def _status(given: Mapping[str, Any], job: Path) -> int:
    from launch import show

    return show.status(job, json=given["json"], watch=given["watch"])


# --------------------------------------------------------------------------- run


def _run_parser(commands: Any) -> _Parser:
    parser: _Parser = commands.add_parser(
        "run", help="run or resume a job", usage=RUN_USAGE, description=RUN_TEXT, epilog=RUN_END
    )
    job = parser.add_argument_group("the job")
    job.add_argument(
        "--dir",
        metavar="D",
        help="job directory (default: everstep-runs/<name>, under SLURM <name>-<job id>)",
    )
    job.add_argument("--name", metavar="NAME", help="the job's name (default: the script's)")
    job.add_argument("--config", metavar="FILE", help="file of options (default: everstep.yaml, if there)")
    job.add_argument(
        "--continue", dest="continue_", action=argparse.BooleanOptionalAction, help="run a finished job on"
    )
    saving = parser.add_argument_group("saving")
    saving.add_argument(
        "--snapshot-every", metavar="INTERVAL", help="copy the state to host RAM (default: 30s)"
    )
    saving.add_argument(
        "--checkpoint-every",
        metavar="INTERVAL",
        help="make a snapshot durable (default: auto, from the measured cost and failure rate)",
    )
    saving.add_argument(
        "--checkpoints",
        metavar="PATH|URL",
        help="where to: a directory, s3://bucket/prefix, gs://… or az://… (default: checkpoints in the job directory)",
    )
    saving.add_argument(
        "--checkpoint-bandwidth",
        metavar="RATE",
        help="at most this much a second, as 200MB (default: no limit)",
    )
    saving.add_argument(
        "--storage-timeout", metavar="TIME", help="an object store's time to answer a request (default: 30s)"
    )
    asking.add_retention(saving)
    stopping = parser.add_argument_group("failing and stopping")
    stopping.add_argument(
        "--max-failures", metavar="N", help="failures without progress before it gives up (default: 5)"
    )
    stopping.add_argument(
        "--max-preemptions",
        metavar="N",
        help="preemptions without progress before it gives up (default: 100)",
    )
    stopping.add_argument(
        "--grace", metavar="TIME", help="time a stop may take to save the state (default: 60s)"
    )
    watching.add_options(stopping)
    stopping.add_argument(
        "--standby",
        metavar="on|off|init",
        help="keep the next attempt launched and imported, so that a failure costs a fraction of a second; init: also run "
        "the script ahead, up to init_process_group (default: on)",
    )
    stopping.add_argument(
        "--standby-memory",
        metavar="SIZE",
        help="drop the standby when less memory than this is available (default: 5 %% of all)",
    )
    stopping.add_argument(
        "--notices",
        metavar="auto|aws|gcp|azure|slurm|none",
        help="whose notices of interruption and maintenance to watch (default: auto, the cloud that this machine is in)",
    )
    stopping.add_argument(
        "--requeue",
        metavar="auto|off",
        help="in a SLURM job: requeue it when its state is saved for a stop (default: auto)",
    )
    nodes = parser.add_argument_group("several nodes (everstep run is started on each of them)")
    nodes.add_argument(
        "--nnodes", metavar="N|MIN:MAX", help="how many (default: torchrun's or SLURM's, else 1)"
    )
    nodes.add_argument(
        "--node-rank", metavar="N", help="which of them this is (default: torchrun's or SLURM's)"
    )
    nodes.add_argument(
        "--node-name",
        metavar="NAME",
        help="what this one is called (default: SLURM's name for it, else the hostname)",
    )
    nodes.add_argument(
        "--store",
        metavar="URL",
        help="where they meet: tcp://HOST:PORT, served by the node of that name, or etcd://HOST:PORT, which lets the job "
        "outlive any node (default: torchrun's --rdzv-endpoint or --master-addr; under SLURM the first node)",
    )
    nodes.add_argument(
        "--lease", metavar="TIME", help="silence after which a node is taken for lost (default: 5s)"
    )
    nodes.add_argument(
        "--node-timeout", metavar="TIME", help="time to wait for nodes when there are too few (default: 600s)"
    )
    nodes.add_argument(
        "--peer-copies",
        metavar="on|off",
        help="keep each node's snapshots in another one's memory, too (default: on)",
    )
    nodes.add_argument(
        "--peer-bandwidth",
        metavar="RATE",
        help="at most this much a second for that, as 500MB (default: no limit)",
    )
    telling.add_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--quiet",
        action=argparse.BooleanOptionalAction,
        help="everstep's own messages only; the logs have all",
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    for action in parser._actions:  # what is not given is not there: the file and the defaults come next
        if action.dest != "words":
            action.default = argparse.SUPPRESS
    return parser


def _run(given: Mapping[str, Any]) -> int:
    from launch import nodes
    from launch.slurm.client import address_of

    options, program = _understood(given)
    options = nodes.complete(options, program, os.environ, address_of)
    return run_job(_with_directory(options, program), program)


def _understood(given: Mapping[str, Any]) -> tuple[Options, Program]:
    from launch import program as programs
    from supervisor import config

    words = list(given["words"])
    if words[:1] == ["--"]:
        del words[0]
    options = config.load(_flags(given))
    return options, programs.parse(words)


def _read_run(words: Sequence[str]) -> tuple[Options, Program]:
    """What comes behind ``everstep run``."""
    parser = _run_parser(_Parser(prog="everstep").add_subparsers(parser_class=_Parser))
    parsed, unknown = parser.parse_known_args(list(words))
    parser.reject(unknown)
    return _understood(vars(parsed))


def _with_directory(options: Options, program: Program) -> Options:
    from dataclasses import replace

    from launch.slurm import scheduler

    if options.dir is not None:
        return options
    return replace(options, dir=RUNS / ((options.name or program.name) + scheduler.suffix(os.environ)))


def run_job(options: Options, program: Program) -> int:
    """Supervise the job to its end; returns the exit code of ``everstep run``."""
    from launch.notices import found
    from launch.slurm import scheduler
    from supervisor.run import run

    engine = scheduler.engine(options, os.environ, lambda text: print(f"everstep: {text}", file=sys.stderr))
    return run(options, program, engine, found.source(options.notices))


def _flags(given: Mapping[str, Any]) -> dict[str, object]:
    """The options among the parsed words that the configuration knows."""
    from supervisor.config import READERS

    known = {name: value for name, value in given.items() if name in READERS or name == "config"}
    return {name: value for name, value in known.items() if value is not None}


# --------------------------------------------------------------------------- status, checkpoints


def _status_parser(commands: Any) -> _Parser:
    parser: _Parser = commands.add_parser("status", help="how a job stands", description="How a job stands.")
    _add_job(parser)
    parser.add_argument(
        "--watch", action="store_true", help="show it again every second, until the job has ended"
    )
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", metavar="D", help="job directory (default: the newest in everstep-runs)")
    parser.add_argument("--json", action="store_true", help="for programs")


def _checkpoints(given: Mapping[str, Any]) -> int:
    from launch import asked

    return asked.answer(given, lambda: find_job(given["dir"]), _flags(given))


if __name__ == "__main__":
    main()
