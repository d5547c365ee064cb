"""Killed in the middle of an epoch, asked to stop in the middle of another, and the same bits as the trainer alone.

Each program trains under everstep and then, when it comes to its end, once more with nothing of everstep in it: the real
library, its own loop, DDP on two ranks where it has that.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from supervisor.model import AttemptEnded, Resumed, SnapshotCompleted, State
from tests.e2e import harness

DEADLINE = 300.0  # seconds: some of these libraries take half a minute to import on a busy machine
PROGRAMS = Path(__file__).parent / "programs"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("command", "ranks", "kill", "stop"),
    [
        pytest.param(["python", "fit_keras.py", "torch"], 1, 17, 31, id="keras-torch"),
        pytest.param(["python", "fit_keras.py", "tensorflow"], 1, 17, 31, id="keras-tensorflow"),
        pytest.param(["torchrun", "fit_transformers.py"], 2, 8, 13, id="transformers"),
        pytest.param(["torchrun", "fit_lightning.py"], 2, 16, 21, id="lightning"),
        pytest.param(["torchrun", "loop_accelerate.py"], 2, 17, 28, id="accelerate"),
    ],
)
def test_killed_and_stopped_it_ends_where_the_trainer_alone_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], ranks: int, kill: int, stop: int
) -> None:
    for name, value in {
        "OUT": tmp_path, "KILL_AT": kill, "STOP_AT": stop, "HF_HUB_OFFLINE": 1, "TF_CPP_MIN_LOG_LEVEL": 2,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    launcher, script, *arguments = command
    script = str(PROGRAMS / script)
    argv = (
        [harness.sys.executable, script, *arguments]
        if launcher == "python"
        else harness.torchrun(script=script, ranks=ranks)
    )
    # Keras chooses its backend by a variable that the script sets: that goes well with a standby; and it is one process
    options = ("--snapshot-every", "2steps", "--standby", "on" if launcher == "python" else "off")
    with harness.job(tmp_path / "job") as job:
        job.start(argv, *options)
        job.until_fact(SnapshotCompleted, lambda fact: fact.step >= kill // 2, deadline=DEADLINE)
        job.until(lambda: (tmp_path / "pid").exists() or None, deadline=DEADLINE)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        job.until(lambda: True if len(list(tmp_path.glob("ready-*"))) == ranks else None, DEADLINE)
        job.signal(signal.SIGTERM)
        assert job.wait(DEADLINE) == 75, job.output
        assert not list(tmp_path.glob("rank-*.json"))
        assert job.run(argv, *options, deadline=DEADLINE) == 0, job.output

        resumed = [fact.step for fact in job.facts(Resumed)]
        assert resumed[0] == 0
        assert kill // 2 <= resumed[1] <= kill
        assert resumed[2] > stop
        record = job.record
        assert record.state is State.COMPLETED
        assert record.step == record.total_steps
        assert [fact.failure.signal for fact in job.facts(AttemptEnded) if fact.failure] == [signal.SIGKILL]
    for rank in range(ranks):
        told = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert told["kept"] == told["plain"]
