"""The command ``everstep``: words in, exit code out. Here, and only here, the parts are put together.

Everything is imported where it is used: ``everstep status`` need not wait for what ``everstep run`` needs, and nothing
here waits for torch. Errors meant for the user are one line on standard error and an exit code (README, exit codes).
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from launch import rehearse, reporting, serving, simulate, telling
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
CHECKPOINTS_END = """\
A checkpoint is meant by its step, by latest, by best, or by the path of its directory, which may also be one that
torch.distributed.checkpoint has written without everstep (it has no digests then, and nothing is verified).
"""
OUTPUT_TEXT = (
    "the ending says the format: .safetensors, .pt or .pth; a name without one becomes a directory of safetensors as "
    "Hugging Face has them"
)


_HANG_LIMITS = {
    "startup": "up to the first step, without a sign of life (default: 30m, once it is known to make steps)",
    "floor": "no learned limit is shorter (default: 1m with a Session, 10m without)",
    "ceiling": "no learned limit is longer; also that of evaluation phases (default: 30m)",
    "silence": "without any output, for programs without torch (default: never)",
}


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
    sys.exit(call(sys.argv[1:] if arguments is None else arguments))


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


def _dispatch(arguments: Sequence[str]) -> int:
    parser = _Parser(prog="everstep", description="Keeps a distributed PyTorch training run going.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    parsers = {"run": _run_parser(commands), "status": _status_parser(commands)}
    checkpoints = commands.add_parser(
        "checkpoints", help="list, verify, look into, compare, export or prune checkpoints"
    )
    parsers |= _checkpoints_parsers(checkpoints)
    parsers["rehearse"] = rehearse.add_parser(commands, _add_job)
    parsers["report"] = reporting.add_parser(commands, _add_job)
    parsers["serve"] = serving.add_parser(commands)
    parsers["simulate"] = simulate.add_parser(commands)
    parsed, unknown = parser.parse_known_args(list(arguments))
    command = parsed.command
    if command is None:
        parser.reject(unknown)
        parser.error("no command given: run, status, report, serve, checkpoints, rehearse or simulate")
    if command == "checkpoints":
        command = parsed.action
    parsers[command].reject(unknown)
    given = vars(parsed)
    if command == "run":
        return _run(given)
    if command == "status":
        from launch import show

        return show.status(find_job(parsed.dir), json=parsed.json, watch=parsed.watch)
    if command == "serve":
        return serving.answer(given, find_jobs)
    if command == "report":
        return reporting.answer(given, lambda: find_job(parsed.dir))
    if command == "simulate":
        return simulate.answer(given)
    if command == "rehearse":
        return rehearse.answer(given, lambda: find_job(parsed.dir))
    return _checkpoints(given)


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
    _add_retention(saving)
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
    stopping.add_argument(
        "--hang",
        metavar="auto|off|TIME",
        help="when ranks that do not go on are killed and restarted: auto learns from the job's own steps, a TIME is "
        "the longest that a step may take (default: auto)",
    )
    for name, text in _HANG_LIMITS.items():
        stopping.add_argument(f"--hang-{name}", metavar="TIME", help=text)
    stopping.add_argument(
        "--standby",
        metavar="on|off",
        help="keep the next attempt launched and imported, so that a failure costs a fraction of a second (default: on)",
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
    from launch import program as programs
    from supervisor import config

    words = list(given["words"])
    if words[:1] == ["--"]:
        del words[0]
    options = config.load(_flags(given))
    program = programs.parse(words)
    return run_job(_with_directory(options, program), program)


def _with_directory(options: Options, program: Program) -> Options:
    from dataclasses import replace

    if options.dir is not None:
        return options
    return replace(options, dir=RUNS / ((options.name or program.name) + _cluster_suffix(os.environ)))


def _cluster_suffix(environ: Mapping[str, str]) -> str:
    """``-4711`` in SLURM job 4711, ``-4711_3`` in task 3 of its array: the same when it is requeued, and no other job's."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"-{array}_{task}"
    job = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID")
    return f"-{job}" if job else ""


def run_job(options: Options, program: Program) -> int:
    """Supervise the job to its end; returns the exit code of ``everstep run``."""
    from supervisor.run import run

    return run(options, program)


def _flags(given: Mapping[str, Any]) -> dict[str, object]:
    """The options among the parsed words that the configuration knows."""
    from supervisor.config import READERS

    return {name: value for name, value in given.items() if name in READERS or name == "config"}


# --------------------------------------------------------------------------- status, checkpoints


def _status_parser(commands: Any) -> _Parser:
    parser: _Parser = commands.add_parser("status", help="how a job stands", description="How a job stands.")
    _add_job(parser)
    parser.add_argument(
        "--watch", action="store_true", help="show it again every second, until the job has ended"
    )
    return parser


def _checkpoints_parsers(parser: argparse.ArgumentParser) -> dict[str, _Parser]:
    parser.epilog = CHECKPOINTS_END
    actions = parser.add_subparsers(
        dest="action",
        metavar="list | verify | inspect | compare | export | prune",
        required=True,
        parser_class=_Parser,
    )
    listing: _Parser = actions.add_parser(
        "list", help="every checkpoint, newest first, with sizes and metrics"
    )
    listing.add_argument("--verify", action="store_true", help="read every byte and compare digests")
    verifying: _Parser = actions.add_parser(
        "verify", help="read every byte and compare digests; exit code 1 if any is bad"
    )
    verifying.add_argument(
        "which",
        nargs="*",
        metavar="CHECKPOINT",
        help="a step, latest, best, or the path of one (default: all)",
    )
    inspecting: _Parser = actions.add_parser("inspect", help="what is in one: keys, shapes, dtypes, sizes")
    comparing: _Parser = actions.add_parser(
        "compare", help="metrics, and by how much each tensor has changed"
    )
    comparing.add_argument("--all", action="store_true", help="show every item, also those that are the same")
    exporting: _Parser = actions.add_parser(
        "export",
        help="to safetensors or torch.save",
        description="Writes a checkpoint, or its weights, to a file for other programs: safetensors or torch.save.",
    )
    exporting.add_argument("-o", "--output", metavar="FILE", required=True, help=OUTPUT_TEXT)
    exporting.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="of each file in a directory (default: 5GB); e.g. 500MB, 2GiB",
    )
    for one in (comparing, exporting):
        one.add_argument("--weights-only", action="store_true", help="only the state of the modules")
    pruning: _Parser = actions.add_parser("prune", help="remove what the retention rules do not keep")
    pruning.add_argument("--dry-run", action="store_true", help="only say which")
    _add_retention(pruning)
    pruning.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="file of options")
    for one, words in ((inspecting, ("which",)), (comparing, ("a", "b")), (exporting, ("which",))):
        for word in words:
            name = "CHECKPOINT" if word == "which" else word.upper()
            one.add_argument(word, metavar=name, help="a step, latest, best, or the path of one")
        one.add_argument("--only", metavar="NAME", help="only what is called NAME or NAME.…, e.g. model")
        one.epilog = CHECKPOINTS_END
    for one in (listing, comparing):
        one.add_argument("--plot", metavar="METRIC", help="show this metric over all checkpoints")
        one.add_argument("-o", "--output", metavar="FILE", help="draw the plot to FILE.svg or FILE.html")
    for one in (listing, verifying, inspecting, comparing, exporting):
        one.add_argument(
            "--best", metavar="METRIC:min|max", help="what `best` goes by (default: keep_best, else loss:min)"
        )
    for one in (listing, verifying, inspecting, comparing, exporting, pruning):
        _add_job(one)
        one.add_argument(
            "--checkpoints",
            metavar="PATH|URL",
            default=argparse.SUPPRESS,
            help="where they are, if elsewhere",
        )
    return {
        "list": listing,
        "verify": verifying,
        "inspect": inspecting,
        "compare": comparing,
        "export": exporting,
        "prune": pruning,
    }


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", metavar="D", help="job directory (default: the newest in everstep-runs)")
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_retention(parser: Any) -> None:
    suppress = argparse.SUPPRESS
    parser.add_argument(
        "--keep-last", metavar="N", default=suppress, help="keep the newest N checkpoints (default: 3)"
    )
    parser.add_argument(
        "--keep-every", metavar="K", default=suppress, help="and those at a multiple of K steps"
    )
    parser.add_argument(
        "--keep-best", metavar="METRIC:min|max:M", default=suppress, help="and the M best by a logged metric"
    )


def _checkpoints(given: Mapping[str, Any]) -> int:
    from launch import asked

    return asked.answer(given, lambda: find_job(given["dir"]), _flags(given))


if __name__ == "__main__":
    main()
