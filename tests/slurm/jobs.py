"""What happens to jobs on a real cluster, one function each: submit, let SLURM do something to it, see how it ends.

They mostly wait (for a grace, for a time limit), so they are run side by side, and the tests look at what came of each.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.model import FirstStep, StopRequested
from tests.e2e import harness
from tests.slurm.lab import Lab

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "deploy" / "slurm" / "everstep.sbatch"
DEADLINE = 240.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
LOADER = str(harness.PROGRAMS / "loader.py")


@dataclass
class Story:
    """One job on the cluster: its directory of its own to be submitted from, and what SLURM says of it."""

    lab: Lab
    folder: Path
    number: str = ""
    shown: dict[str, str] = field(default_factory=dict)
    beside: Story | None = None  # another job on the same nodes

    @property
    def go(self) -> Path:
        """When this file is there, the training hurries."""
        return self.folder / "go"

    @property
    def out(self) -> Path:
        """Where the digests of the weights come."""
        return self.folder / "out"

    @property
    def log(self) -> str:
        """What the batch scripts have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("slurm-*.out")))

    @property
    def job(self) -> harness.Job:
        """The job directory."""
        found = list((self.folder / "everstep-runs").glob("*/job.json"))
        assert len(found) == 1, f"{found}\n{self.log}"
        return harness.Job(found[0].parent)

    def environment(self, **more: str) -> dict[str, str]:
        outer = {k: v for k, v in harness.environment().items() if not k.startswith(("SLURM", "SBATCH"))}
        return {**outer, "SLURM_CONF": self.lab.environment["SLURM_CONF"], **more}

    def submit(self, sbatch: Sequence[object], command: Sequence[object]) -> None:
        """By ``everstep submit slurm``."""
        words = [sys.executable, "-m", "launch.cli", "submit", "slurm", *sbatch, "--", *command]
        result = subprocess.run(
            [str(word) for word in words], env=self.environment(), cwd=self.folder, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        self.number = result.stdout.strip()
        assert self.number.isdecimal(), result.stdout

    @property
    def arguments(self) -> list[object]:
        """Of a training script: it is slow until ``go``, so that whatever SLURM takes its time for comes before its end."""
        return ["--out", self.out, "--pause", 4, "--pause-until", self.go]

    def until(self, *states: str, restarts: int = 0) -> None:
        """Wait for one of the states."""
        self.shown = self.lab.until(self.number, *states, restarts=restarts, deadline=DEADLINE)

    def until_it_steps(self) -> None:
        """Wait for the first step of the first attempt."""
        limit = time.monotonic() + DEADLINE
        while not self._has_stepped():
            assert time.monotonic() < limit, self.log
            state = self.lab.state(self.number) if self.number else "PENDING"
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}: {self.log}"
            time.sleep(0.1)

    def until_it_has_saved(self) -> None:
        """Wait for a checkpoint."""
        limit = time.monotonic() + DEADLINE
        while self.job.record.checkpoint is None:
            assert time.monotonic() < limit, self.log
            time.sleep(0.1)

    def _has_stepped(self) -> bool:
        if not list((self.folder / "everstep-runs").glob("*/job.json")):
            return False
        return bool(self.job.facts(FirstStep))

    def finish(self, restarts: int = 0) -> None:
        """Once it has been asked to stop, hurry, and wait for the job's end after so many restarts at least."""
        limit = time.monotonic() + DEADLINE
        while not self.job.facts(StopRequested):  # else it might come to its end before
            assert time.monotonic() < limit, self.log
            time.sleep(0.1)
        self.go.touch()
        self.until(*OVER, restarts=restarts)


def requeue(story: Story) -> None:
    """An operator requeues it: SIGTERM to every process of the job, data loader workers included."""
    story.submit(
        ["--nodelist=n1", "--time=10"],
        ["--snapshot-every", "never", "--standby", "off", *harness.torchrun(*story.arguments, "--method", "fork", script=LOADER)],
    )  # fmt: skip
    story.until_it_steps()
    story.lab.call("scontrol", "requeue", story.number)
    story.finish(restarts=1)


def preemption(story: Story) -> None:
    """A job of a higher partition takes its node: SIGTERM to the tasks at once, an end within the grace."""
    story.submit(
        ["--nodelist=n2", "--exclusive", "--time=10"],
        ["--snapshot-every", "never", *harness.torchrun(*story.arguments)],
    )
    _preempt(story, "n2")


def at_once(story: Story) -> None:
    """Likewise, but there is no grace: SIGTERM to all, and SLURM requeues the job itself."""
    story.submit(
        ["--partition=bare", "--nodelist=n3", "--exclusive", "--time=10"],
        ["--snapshot-every", "never", "--standby", "off", sys.executable, harness.TRAIN, *story.arguments],
    )
    _preempt(story, "n3")


def user_signal(story: Story) -> None:
    """Likewise, with a grace, and it is told by the signal that it has asked for (preempt_send_user_signal)."""
    story.submit(
        ["--nodelist=n4", "--exclusive", "--time=10", "--signal=USR2@5"],
        ["--snapshot-every", "never", "--standby", "off", sys.executable, harness.TRAIN, *story.arguments],
    )
    _preempt(story, "n4")


def _preempt(story: Story, node: str) -> None:
    story.until_it_steps()
    story.lab.call(
        "sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true",
    )  # fmt: skip
    story.finish(restarts=1)


def limit(story: Story) -> None:
    """On two nodes; its time is up before it is done: it has to stop early enough, and go on in the next allocation."""
    story.submit(
        ["--nodes=2", "--nodelist=n[1,5]", "--time=1"],
        ["--checkpoint-every", "5s", "--standby", "off", *harness.torchrun(*story.arguments, ranks=1)],
    )  # fmt: skip
    while True:  # on a machine that is too busy an allocation may end before the first step
        restarts = int(story.shown.get("Restarts", "0")) + 1
        story.until("PENDING", restarts=restarts)
        if story.job.record.checkpoint is not None:
            break
    # a busy machine may need all of another minute: the end of the training must not run into a limit
    story.lab.call("scontrol", "update", f"JobId={story.number}", "TimeLimit=10")
    story.finish(restarts)


def restarts(story: Story) -> None:
    """On two nodes; SLURM's own daemons end under it and come back, which is nothing to it. Then an operator requeues it."""
    story.submit(
        ["--nodes=2", "--nodelist=n[1,5]", "--time=10"],
        ["--snapshot-every", "never", "--standby", "off", *harness.torchrun(*story.arguments, ranks=1)],
    )
    story.until_it_steps()
    story.lab.restart("n5")
    story.lab.restart("slurmctld")
    story.lab.call("scontrol", "requeue", story.number)
    story.finish(restarts=1)


def lost(story: Story) -> None:
    """Two jobs on the same two nodes, one of which is lost: this one may go on without it, the other is run again by SLURM."""
    story.beside = other = Story(story.lab, story.folder / "other")
    other.folder.mkdir()
    nodes = ["--nodes=2", "--nodelist=n[5-6]", "--time=10"]
    options = ["--snapshot-every", "1step", "--checkpoint-every", "1step", "--standby", "off"]
    story.submit(
        [*nodes, "--no-kill"], [*options, "--nnodes", "1:2", *harness.torchrun(*story.arguments, ranks=1)]
    )
    other.submit(nodes, [*options, *harness.torchrun(*other.arguments, ranks=1)])
    for one in (story, other):
        one.until_it_steps()
        one.until_it_has_saved()
    story.lab.lose("n6")
    story.go.touch()
    other.until("PENDING", restarts=1)
    story.until(*OVER)
    story.lab.bring_back("n6")
    other.go.touch()
    other.until(*OVER, restarts=1)


def cancel(story: Story) -> None:
    """Its user cancels it."""
    story.submit(
        ["--nodelist=n1", "--time=10"],
        ["--snapshot-every", "never", "--standby", "off", sys.executable, harness.TRAIN, *story.arguments],
    )
    story.until_it_steps()
    story.lab.call("scancel", story.number)
    story.until("CANCELLED")


def killed(story: Story) -> None:
    """Its supervisor is killed, and all with it: what it had in memory is the epilog's to remove."""
    story.submit(
        ["--nodelist=n1", "--time=10"],
        ["--snapshot-every", "1step", "--standby", "off", sys.executable, harness.TRAIN, *story.arguments],
    )
    story.until_it_steps()
    assert story.job.runtime.exists()
    assert story.job.record.pid is not None
    os.kill(story.job.record.pid, signal.SIGKILL)
    story.until("FAILED")


def container(story: Story) -> None:
    """The template, with an everstep that has no scontrol, told by SLURM's signal to the batch script alone: the end is near."""
    tools, hidden = story.folder / "tools", story.folder / "hidden"
    for folder in (tools, hidden):
        folder.mkdir()
    for name in ("env", "sh"):
        (hidden / name).symlink_to(shutil.which(name) or "")
    wrapper = tools / "everstep"
    wrapper.write_text(f'#!/bin/sh\nPATH={harness.BIN}:{hidden} exec {harness.BIN}/everstep "$@"\n')
    wrapper.chmod(0o755)
    arguments = [harness.TRAIN, *map(str, story.arguments)]
    (story.folder / "train.py").write_text(
        f"import runpy, sys\nsys.argv = {arguments!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    (story.folder / "everstep.yaml").write_text("standby: off\nsnapshot-every: never\n")
    path = f"{tools}:{os.environ['PATH']}"
    output = story.lab.call(
        "sbatch", "--parsable", "--time=10", "--signal=B:USR1@120", "--nodelist=n7", TEMPLATE, cwd=story.folder,
        environment=story.environment(PATH=path),
    )  # fmt: skip
    story.number = output.strip()
    story.until_it_steps()
    story.lab.call("scontrol", "update", f"JobId={story.number}", "TimeLimit=2")  # it looks every 30 s
    story.until("PENDING", restarts=1)
    story.lab.call("scontrol", "update", f"JobId={story.number}", "TimeLimit=10")
    story.finish(restarts=1)


def chain(story: Story) -> None:
    """Where requeueing is forbidden: it submits its successor, in which the training ends."""
    story.submit(
        ["--chain", "--nodelist=n1", "--time=10"],
        ["--snapshot-every", "never", "--standby", "off", sys.executable, harness.TRAIN, *story.arguments],
    )
    story.until_it_steps()
    story.lab.call("scancel", "--signal=USR2", story.number)
    story.until("FAILED")
    first, story.number = story.number, _successor(story)
    assert story.number != first
    story.finish()


def _successor(story: Story) -> str:
    limit = time.monotonic() + DEADLINE
    while time.monotonic() < limit:
        for line in story.lab.call("squeue", "--noheader", "--states=all", "--format=%i %Z").splitlines():
            number, _, folder = line.strip().partition(" ")
            if folder == str(story.folder) and number != story.number:
                return number
        time.sleep(0.1)
    raise AssertionError(f"no successor: {story.log}")


#: the first one has a minute, so the others wait for its first step
STORIES: tuple[Callable[[Story], None], ...] = (
    limit, lost, restarts, preemption, at_once, user_signal, requeue, cancel, killed, chain, container,
)  # fmt: skip
