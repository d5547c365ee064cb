"""The ways of running a script so that it comes back after a failure: ours, and the peers that it is compared with.

``ft_launcher`` (NVIDIA's resiliency extension) gets a virtual environment of its own beside this one, with the same torch: what
it requires shall not decide what everstep is developed with.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import psutil

from supervisor.edge import journal
from supervisor.model import Fact

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PEERS = Path(f"{sys.prefix}-peers")
RESILIENCY = "nvidia-resiliency-ext==0.4.1"

TORCHRUN = ("torchrun", "--nproc-per-node=2")
EVERSTEP = (sys.executable, "-m", "launch.cli", "run", "--dir", "JOB", "--quiet")
LOOP = ("bash", "-c", 'while ! "$@"; do :; done', "loop", *TORCHRUN, "--standalone")
MANY = "--max-restarts=100000"


def ft_launcher() -> Path:
    """NVIDIA's launcher, installed the first time."""
    launcher = PEERS / "bin" / "ft_launcher"
    if not launcher.exists():
        print(f"preparing {PEERS} with {RESILIENCY} (a minute or so, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        packages = (RESILIENCY, f"torch=={version('torch').partition('+')[0]}")
        pip = (PEERS / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        subprocess.run([*pip, *packages], check=True)
    return launcher


class Run:
    """One way of running a script, alive in a folder of its own. SCRIPT and JOB in the command stand for their paths."""

    def __init__(
        self, command: Sequence[str | Path], source: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="everstep-benchmark-"))
        script = self.folder / "train.py"
        script.write_text(source)
        self.job = self.folder / "job"
        places = {"SCRIPT": str(script), "JOB": str(self.job)}
        self._words = [places.get(str(word), str(word)) for word in command]
        self._environment = {
            **os.environ,
            "BENCH": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            **(environment or {}),
        }
        self.start()

    def start(self) -> None:
        """Start the command."""
        with open(self.folder / "output", "ab") as sink:
            self.process = subprocess.Popen(
                self._words,
                env=self._environment,
                cwd=self.folder,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed."""
        return (self.folder / "output").read_text(errors="replace")

    def facts(self) -> list[Fact]:
        """Everstep's journal so far, nothing for the others."""
        with contextlib.suppress(OSError):
            return journal.read(self.job / "journal", lambda _: None)
        return []

    @property
    def runtime(self) -> Path | None:
        """Where everstep keeps snapshots, once it does."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return Path(json.loads((self.job / "job.json").read_text())["runtime"])
        return None

    def tree(self) -> list[psutil.Process]:
        """All of it, the first process first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def end(self) -> None:
        """End all of it, and only it."""
        tree = self.tree()
        for process in tree:  # the loop first, or it would start the next
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(tree[1:], timeout=20)

    def close(self) -> None:
        """End it and leave nothing behind."""
        self.end()
        if self.runtime is not None:
            shutil.rmtree(self.runtime, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
