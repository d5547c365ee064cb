"""torchrun's entry of one attempt: ``python agent.py PARENT TORCHRUN_PATH torchrun's words…``, started by file path.

It makes torchrun a good child. It dies with its supervisor (parent-death signal). It ignores the signals that SLURM, a
terminal or an operator send to the whole process tree: torchrun would answer them by killing the workers, whose state
the supervisor is about to save. Requests reach the workers through the supervisor only. Then torchrun's own code runs, with
the ``sys.argv`` and ``sys.path`` that the user's command would have given it.

Standard library only, nothing of ours: it runs in the user's interpreter.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036 (it is the user's interpreter, whichever that is)
    print(f"everstep: Python 3.11 or newer is required, {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)  # as for wrong arguments: trying again is of no use

PR_SET_PDEATHSIG = 1
IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
#: a signal that nobody sends: torchrun wants at least one to handle
UNUSED = "SIGURG"
SIGNALS_OPTION = "--signals-to-handle"


def main(words: list[str]) -> None:
    """Never returns normally when torchrun fails: its exception or exit code is the process's."""
    parent, path, *arguments = words
    _die_with(int(parent))
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    _restore_path(path)
    sys.argv = [path or "torchrun", *arguments]
    run: Any = importlib.import_module("torch.distributed.run")
    hidden = {name: os.environ.pop(name) for name in _hidden_variables() if name in os.environ}
    parsed = run.parse_args([*_ours(run), *arguments])
    os.environ.update(hidden)  # they were hidden from torchrun's parser, not from the user's script
    run.record(run.run)(parsed)


def _ours(run: Any) -> list[str]:
    """Options that depend on this torch or this attempt; what the user gave comes after them and wins."""
    options = [f"--rdzv-id={os.environ['EVERSTEP_RUN_ID']}"]
    if SIGNALS_OPTION in run.get_args_parser().format_help():
        options.append(f"{SIGNALS_OPTION}={UNUSED}")
    if "PET_LOG_DIR" not in os.environ:  # torchrun's error files: kept with the attempt, not strewn in /tmp
        attempt = int(os.environ["EVERSTEP_ATTEMPT"])
        folder = os.environ["EVERSTEP_DIR"]
        options.append(f"--log-dir={folder}/attempts/{attempt:06d}/torchelastic")
    return options


def _die_with(parent: int) -> None:
    """SIGKILL at the death of the supervisor, which may already have happened."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("everstep: the supervisor is gone")


def _restore_path(path: str) -> None:
    """``sys.path[0]`` as torchrun would have it: its own folder, or the cwd for ``python -m``."""
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path)) if path else os.getcwd()


def _hidden_variables() -> tuple[str, ...]:
    names = "NNODES NODE_RANK RDZV_BACKEND RDZV_ENDPOINT RDZV_ID RDZV_CONF STANDALONE MASTER_ADDR MASTER_PORT"
    names += " MAX_RESTARTS SIGNALS_TO_HANDLE MODULE NO_PYTHON RUN_PATH"
    return tuple(f"PET_{name}" for name in names.split())


if __name__ == "__main__":
    main(sys.argv[1:])
