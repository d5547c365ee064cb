"""``everstep submit slurm``: a job of everstep for the cluster's queue."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from supervisor.errors import UsageError

if TYPE_CHECKING:
    from launch.program import Program
    from supervisor.config import Options

PATIENCE: Final = 60.0  # seconds that sbatch may take
_HELP: Final = ("-h", "--help")
USAGE = "everstep submit slurm [--print] [--chain] [sbatch's options] -- [everstep run's options] torchrun …"
TEXT = """\
Writes the batch script of a job and submits it: everstep run on each node, and again after every time limit and every
preemption until the training is finished. What comes before -- is sbatch's, what comes behind it is what you would
write behind `everstep run`. Both are checked before anything is submitted.
"""
END = """\
own options: --print shows the script and submits nothing; --chain is for clusters that forbid requeueing: a job whose state is
saved submits the next one, which carries on
exit codes: 0 submitted (prints the job's number), 1 refused by SLURM, 64 wrong usage, 78 wrong configuration
"""

#: reads what comes behind ``everstep run``: the options, the program
Read = Callable[[Sequence[str]], "tuple[Options, Program]"]


def add_parser(commands: Any) -> Any:
    """The words of the command."""
    parser = commands.add_parser(
        "submit", help="submit a job to SLURM", usage=USAGE, description=TEXT, epilog=END
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(help=parser.format_help)
    return parser


def answer(given: Mapping[str, Any], read: Read) -> int:
    """Submit, or print the script; returns the exit code. Raises UsageError, ConfigError."""
    engine, *words = given["words"] or [""]
    if engine != "slurm":
        raise UsageError(f"{f'{engine!r} is unknown' if engine else 'to whom?'} (allowed: {USAGE})")
    if set(_HELP) & set(words[: words.index("--")] if "--" in words else words):
        print(given["help"](), end="")
        return 0
    script = built(words, read, _everstep())
    if "--print" in _before(words):
        print(script, end="")
        return 0
    return _submit(script)


def built(words: Sequence[str], read: Read, everstep: Sequence[str]) -> str:
    """The batch script that the words ask for. Raises UsageError, ConfigError."""
    from launch.slurm import options
    from launch.slurm.script import Batch, build

    own = _before(words)
    command = list(words[len(own) + 1 :])
    if not command:
        raise UsageError(f"no program given: {USAGE}")
    chain = "--chain" in own
    sbatch = options.parse([word for word in own if word not in ("--print", "--chain")])
    run, program = read(command)
    _check_nodes(sbatch.get("nodes") or "1", run, program)
    if sbatch.get("array") and run.dir is not None:
        raise UsageError(
            f"--dir {run.dir}: the tasks of an array need a directory each, so leave it to everstep"
        )
    if sbatch.get("array") and chain:
        raise UsageError("--chain does not go with --array: the successor would be the whole array again")
    name = run.name or program.name
    return build(
        Batch(
            everstep=everstep,
            words=command,
            name=name,
            options=sbatch,
            directory=f"everstep-runs/{name}-" if run.dir is None else str(run.dir),
            found=run.dir is None,
            requeue=run.requeue == "auto",
            chain=chain,
        )
    )


def _check_nodes(nodes: str, run: Options, program: Program) -> None:
    """Raise UsageError where the job would have fewer nodes than the training is to have, or cannot use several."""
    from launch.nodes import complete

    several = nodes not in ("1", "1-1")
    if several and program.launcher is None:
        raise UsageError(
            f"--nodes={nodes}: several nodes are torchrun's to start, but this is {program.command[0]}"
        )
    size, most = complete(run, program, {}).nnodes, nodes.rpartition("-")[2]
    if size is not None and most.isdecimal() and size.least > int(most):
        raise UsageError(f"--nodes={nodes}: fewer than the training's --nnodes {size}")


def _before(words: Sequence[str]) -> list[str]:
    """What is sbatch's."""
    if "--" not in words:
        raise UsageError(f"-- is missing in front of the command: {USAGE}")
    return list(words[: list(words).index("--")])


def _everstep() -> list[str]:
    """How this everstep is called on a node that has the same files."""
    beside = Path(sys.executable).with_name("everstep")
    return [str(beside)] if os.access(beside, os.X_OK) else [sys.executable, "-m", "launch.cli"]


def _submit(script: str) -> int:
    try:
        result = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        raise UsageError(
            "there is no sbatch on PATH: submit from a host of the cluster, or use --print"
        ) from None
    except subprocess.TimeoutExpired:
        print(f"everstep: sbatch has not answered within {PATIENCE:g} s: see `squeue --me`", file=sys.stderr)
        return 1
    for line in result.stderr.splitlines():
        print(f"everstep: {line}", file=sys.stderr)
    if result.returncode:
        return 1
    print(result.stdout.strip().partition(";")[0])  # behind the semicolon: the cluster's name
    return 0
