"""Kill a process at its N-th file operation, for all N. Run by ``test_crash.py``: ``crasher.py SCENARIO ROOT``.

For each N, ``ROOT/template`` is copied to ``ROOT/N`` and a fork carries out the scenario there, killing itself with
SIGKILL just before operation N. The last N is the one that was not reached; its number is printed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from supervisor.checkpoint.catalog import inspect, remove, step_directory, sweep
from supervisor.checkpoint.commit import drain, seal
from supervisor.edge.files import LOCAL, Files, WatchedFiles
from tests.checkpoint.tools import origin

NEW = 200


def drain_new(root: Path, files: Files) -> None:
    """Also over what lies there: the template decides."""
    drain(root / "slot", step_directory(root / "checkpoints", NEW), origin(NEW), files=files, threads=1)


def drain_in_threads(root: Path, files: Files) -> None:
    drain(root / "slot", step_directory(root / "checkpoints", NEW), origin(NEW), files=files, threads=3)


def seal_new(root: Path, files: Files) -> None:
    shutil.copytree(root / "slot", step_directory(root / "checkpoints", NEW), dirs_exist_ok=True)
    seal(step_directory(root / "checkpoints", NEW), origin(NEW), files=files, threads=1)


def remove_new(root: Path, files: Files) -> None:
    remove(inspect(step_directory(root / "checkpoints", NEW)), files=files)


def sweep_all(root: Path, files: Files) -> None:
    sweep(root / "checkpoints", files=files)


SCENARIOS: dict[str, Callable[[Path, Files], None]] = {
    scenario.__name__: scenario for scenario in (drain_new, drain_in_threads, seal_new, remove_new, sweep_all)
}


def deadly(moment: int) -> Files:
    """Files whose operation number ``moment`` is never carried out."""
    seen = [0]

    def before(operation: str, path: Path) -> None:
        seen[0] += 1
        if seen[0] > moment:
            os.kill(os.getpid(), signal.SIGKILL)

    return WatchedFiles(LOCAL, before)


def main(scenario: str, root: Path) -> None:
    for moment in range(1000):
        work = root / str(moment)
        shutil.copytree(root / "template", work, symlinks=True)
        child = os.fork()
        if child == 0:
            SCENARIOS[scenario](work, deadly(moment))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            print(moment)
            return
        if status != -signal.SIGKILL:
            sys.exit(f"moment {moment}: the child ended with {status}")
    sys.exit("the scenario never ends")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
