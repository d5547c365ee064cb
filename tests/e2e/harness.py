"""Runs real ``everstep run`` processes and waits for what they write down."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from launch import cli
from supervisor.decide import lifecycle
from supervisor.edge import journal
from supervisor.model import Fact
from supervisor.record import JobRecord

PROGRAMS = Path(__file__).parent / "programs"
TRAIN = str(PROGRAMS / "train.py")
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent.parent
DEADLINE = 400.0  # seconds; a machine may be busy, and what does not come to pass is said all the same

#: without a standby, as ``Job.start`` has it, for what is to be started in other ways
RUN = [sys.executable, "-m", "launch.cli", "run", "--standby", "off"]

T = TypeVar("T")
F = TypeVar("F", bound=Fact)


def environment(faults: Sequence[dict[str, object]] = ()) -> dict[str, str]:
    """Ours, less what an outer torchrun or everstep might have left, plus the script's faults."""
    mine = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("EVERSTEP_", "TORCHELASTIC", "RANK", "WORLD_SIZE", "KERAS_BACKEND"))
    }
    return {**mine, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULTS": json.dumps(list(faults))}


def torchrun(*arguments: object, ranks: int = 2, script: str = TRAIN) -> list[str]:
    return [str(BIN / "torchrun"), f"--nproc-per-node={ranks}", script, *map(str, arguments)]


def python(*arguments: object, script: str = TRAIN) -> list[str]:
    """A single process, without torchrun: what is not about ranks is as true of it, and takes a third of the time."""
    return [sys.executable, script, *map(str, arguments)]


class Job:
    """One job directory, and the supervisor that runs it at present."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.environ: dict[str, str] = {}  # beside ours
        self.standby = "off"  # unless the options say: launching one takes as long as many a test
        self._read: tuple[list[tuple[str, int]], list[Fact]] = (
            [],
            [],
        )  # the journal, when its files were so long

    def start(
        self, command: Sequence[str], *options: object, faults: Sequence[dict[str, object]] = ()
    ) -> subprocess.Popen[bytes]:
        """Start ``everstep run`` in a session (and so a process group) of its own; output goes to ``self.output``."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        standby = () if "--standby" in options else ("--standby", self.standby)
        argv = [sys.executable, "-m", "launch.cli", "run", "--dir", self.folder, *standby, *options, *command]
        argv = [
            "env",
            "--default-signal=HUP",
            *argv,
        ]  # nohup, by which tests may have been started, ignores it
        with open(self.output_path, "ab") as sink:
            self.process = subprocess.Popen(
                [str(word) for word in argv], cwd=ROOT, env=environment(faults) | self.environ, stdin=subprocess.DEVNULL,
                stdout=sink, stderr=sink, start_new_session=True,
            )  # fmt: skip
        return self.process

    def run(
        self,
        command: Sequence[str],
        *options: object,
        faults: Sequence[dict[str, object]] = (),
        deadline: float = DEADLINE,
    ) -> int:
        """Start, and wait for the exit code."""
        self.start(command, *options, faults=faults)
        return self.wait(deadline)

    def wait(self, deadline: float = DEADLINE) -> int:
        """The exit code; fails with the output when the supervisor does not end in time."""
        assert self.process is not None
        try:
            return self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline} s:\n{self.output}") from None

    def until(self, found: Callable[[], T | None], deadline: float = DEADLINE) -> T:
        """Wait until ``found`` finds something; fails with the output when it does not, or the supervisor ends before."""
        limit = time.monotonic() + deadline
        while True:
            if (result := found()) is not None:
                return result
            if (
                self.process is not None
                and self.process.poll() is not None
                and (result := found()) is not None
            ):
                return result
            if time.monotonic() > limit or (self.process is not None and self.process.poll() is not None):
                raise AssertionError(f"it did not come to pass:\n{self.output}\n{self.facts()}")
            time.sleep(0.02)

    def until_fact(
        self, kind: type[F], where: Callable[[F], bool] = lambda fact: True, deadline: float = DEADLINE
    ) -> T:
        """Wait for a fact in the journal."""
        return self.until(
            lambda: next((f for f in self.facts() if isinstance(f, kind) and where(f)), None), deadline
        )

    def signal(self, signum: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    def facts(self, kind: type[F] | None = None) -> list[F]:
        """The journal so far."""
        sizes = [(path.name, path.stat().st_size) for path in (self.folder / "journal").glob("*.jsonl")]
        if sizes != self._read[0]:
            self._read = sizes, journal.read(self.folder / "journal", lambda problem: None)
        return [fact for fact in self._read[1] if kind is None or isinstance(fact, kind)]  # type: ignore[misc]

    @property
    def record(self) -> JobRecord:
        """The job that the journal tells of; every fact must be possible where it stands."""
        return lifecycle.fold(self.facts())

    def status(self) -> dict[str, object]:
        """``everstep status --json``, without a process of its own: it is asked often."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert cli.call(["status", "--json", "--dir", str(self.folder)]) == 0
        return json.loads(said.getvalue())  # type: ignore[no-any-return]

    @property
    def output_path(self) -> Path:
        return self.folder.with_suffix(".out")

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace") if self.output_path.exists() else ""

    @property
    def runtime(self) -> Path:
        return Path(json.loads((self.folder / "job.json").read_text())["runtime"])

    def processes(self) -> list[psutil.Process]:
        """Every process that bears this job's run id in its environment."""
        run_id = json.loads((self.folder / "job.json").read_text())["run_id"]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get("EVERSTEP_RUN_ID") == run_id
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def until_no_processes(self, deadline: float = 20.0) -> None:
        limit = time.monotonic() + deadline
        while left := self.processes():
            assert time.monotonic() < limit, f"left over: {left}"
            time.sleep(0.02)

    def close(self) -> None:
        """Leave nothing behind, whatever the test did."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if (self.folder / "job.json").exists():
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            import shutil

            shutil.rmtree(self.runtime, ignore_errors=True)


@contextlib.contextmanager
def job(folder: Path) -> Iterator[Job]:
    one = Job(folder)
    try:
        yield one
    finally:
        one.close()


def digests(out: Path) -> dict[str, str]:
    """What each rank wrote of its final weights."""
    return {path.name: path.read_text() for path in sorted(out.glob("digest-*"))}


def plain_digests(out: Path, steps: int, ranks: int = 2) -> dict[str, str]:
    """Digests of the final weights of the same script under plain torchrun (of one rank: alone), without a Session.

    What counts is that every rank came to its last line. torchrun's own exit code does not: gloo aborts a process now and
    then in its destructors, after that ("terminate called without an active exception", torch 2.13).
    """
    argv = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={ranks}", TRAIN, "--out", str(out)]
    if ranks == 1:
        argv = python("--out", out)
    result = subprocess.run(
        [*argv, "--steps", str(steps), "--no-session"],
        env=environment(), timeout=DEADLINE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = digests(out)
    assert len(found) == ranks, result.stdout + result.stderr
    return found
