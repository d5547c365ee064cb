"""The example that logs to TensorBoard: one curve across a kill, value for value that of an undisturbed run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from supervisor.model import AttemptEnded, FirstStep, SnapshotCompleted
from tests.e2e.harness import DEADLINE, ROOT, Job, environment

EXAMPLE = str(ROOT / "examples" / "tensorboard_curve.py")
STEPS = 400


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """As TensorBoard shows it."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_the_curve_has_every_step_once(job: Job, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLE, "--steps", str(STEPS)]
    job.start([*command, "--pause", "0.02"], "--snapshot-every", "20steps")
    first = job.until_fact(FirstStep)
    # two files of one second would be in the order of their pids
    job.until_fact(SnapshotCompleted, lambda fact: fact.time > first.time + 2)
    (worker,) = (
        each
        for each in psutil.Process(job.process.pid).children()
        if EXAMPLE in each.cmdline() and not each.environ().get("EVERSTEP_STANDBY")
    )  # type: ignore[union-attr]
    worker.send_signal(signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert len(job.facts(AttemptEnded)) == 2
    plain = tmp_path / "plain"
    subprocess.run(
        [*command, "--folder", str(plain)],
        env=environment(),
        timeout=DEADLINE,
        check=True,
        capture_output=True,
    )
    for name in ("loss", "grad_norm"):
        values = curve(job.folder / "tensorboard", name)
        assert [step for step, _ in values] == list(range(STEPS))
        assert values == curve(plain, name)
    assert len(list((job.folder / "tensorboard").iterdir())) == 2
