"""The standby: a failure is answered by the attempt that waits, and nothing else is changed by its being there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from supervisor.model import AttemptStarted, FirstStep, SnapshotCompleted, StandbyReady, State
from tests.e2e import harness
from tests.e2e.harness import Job, digests, torchrun

STANDBY = "on"
STEPS = 1500  # minutes of them, until the test says that it has seen enough
SLOW = ("--steps", STEPS, "--pause", "0.1")
SNAPSHOTS = ("--snapshot-every", "5steps")


def workers(job: Job, attempt: int) -> list[psutil.Process]:
    """The ranks of one attempt, waiting or not, in order."""
    found = {}
    for process in job.processes():
        try:
            environ = process.environ()
        except psutil.Error:
            continue
        if environ.get("EVERSTEP_ATTEMPT") == str(attempt) and "RANK" in environ:
            found[int(environ["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def ready(job: Job, attempt: int) -> StandbyReady:
    return job.until_fact(StandbyReady, lambda fact: fact.attempt == attempt)


def recovered(job: Job, attempt: int, *, standby: bool) -> None:
    job.until_fact(FirstStep, lambda fact: fact.attempt == attempt)
    assert [f.standby for f in job.facts(AttemptStarted) if f.attempt == attempt] == [standby], job.output


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the same number of steps under plain torchrun."""
    out = tmp_path_factory.mktemp("long")
    subprocess.run(
        torchrun("--out", out, "--steps", STEPS, "--no-session"),
        env=harness.environment(), check=True, timeout=harness.DEADLINE, capture_output=True,
    )  # fmt: skip
    return digests(out)


def test_three_kills_in_a_row_are_answered_by_the_standby(
    job: Job, tmp_path: Path, long_run: dict[str, str]
) -> None:
    out = tmp_path / "out"
    enough = tmp_path / "enough"
    job.start(torchrun("--out", out, *SLOW, "--pause-until", enough), *SNAPSHOTS)
    for attempt in range(3):
        ready(job, attempt + 1)
        since = job.record.failure_committed_step
        job.until_fact(
            SnapshotCompleted, lambda fact, n=attempt, s=since: fact.attempt == n and fact.step > s
        )
        workers(job, attempt)[attempt % 2].kill()
        recovered(job, attempt + 1, standby=True)
        assert not workers(job, attempt)
    enough.touch()
    assert job.wait() == 0, job.output
    assert digests(out) == long_run
    assert job.record.state is State.COMPLETED
    for attempt in range(3):
        assert (job.folder / "attempts" / f"{attempt:06d}" / "failure.json").exists()
    assert not (job.folder / "attempts" / "000004").exists(), "an attempt that never was leaves no folder"
    job.until_no_processes()
    assert not job.runtime.exists()


def test_a_standby_that_is_killed_is_replaced_and_disturbs_nothing(job: Job, tmp_path: Path) -> None:
    job.start(torchrun("--out", tmp_path / "out", *SLOW, ranks=1), *SNAPSHOTS)
    first = ready(job, 1)
    workers(job, 1)[0].kill()
    job.until_fact(StandbyReady, lambda fact: fact.time > first.time)
    assert "the standby has ended" in job.output
    assert not job.record.restarts
    job.until_fact(SnapshotCompleted)
    workers(job, 0)[0].kill()
    recovered(job, 1, standby=True)
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    job.until_no_processes()
    assert not job.runtime.exists()


def test_a_standby_that_is_not_ready_yet_makes_way(job: Job, tmp_path: Path) -> None:
    """Killed on its way to the gate, with the attempt beside it: a cold start, of the same number."""
    job.start(torchrun("--out", tmp_path / "out", *SLOW, ranks=1), *SNAPSHOTS)
    job.until_fact(FirstStep)
    job.until(lambda: workers(job, 1) or None)  # type: ignore[type-var,arg-type]
    workers(job, 0)[0].kill()
    job.until_fact(FirstStep, lambda fact: fact.attempt == 1)
    assert job.record.restarts == 1
    assert len(workers(job, 1)) == 1
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    job.until_no_processes()


def test_the_standby_dies_with_its_supervisor(job: Job, tmp_path: Path) -> None:
    job.start(torchrun("--out", tmp_path / "out", *SLOW, ranks=1), *SNAPSHOTS)
    ready(job, 1)
    assert len(workers(job, 1)) == 1
    job.signal(signal.SIGKILL)
    assert job.wait() == -9
    job.until_no_processes()
    job.start(
        torchrun("--out", tmp_path / "out", *SLOW, ranks=1), *SNAPSHOTS
    )  # the number that the standby bore
    recovered(job, 1, standby=False)
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.output


def test_a_signal_to_the_whole_tree_stops_it_as_ever(job: Job, tmp_path: Path) -> None:
    job.start(torchrun("--out", tmp_path / "out", *SLOW), "--snapshot-every", "never")
    ready(job, 1)
    assert job.process is not None
    root = psutil.Process(job.process.pid)
    for process in [root, *root.children(recursive=True)]:
        process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    assert "the standby has ended" not in job.output
    assert job.record.checkpoint is not None
    assert not (job.folder / "attempts" / "000001").exists()
    job.until_no_processes()
    assert not job.runtime.exists()


SURROUNDINGS = str(harness.PROGRAMS / "surroundings.py")
FORMS: dict[str, list[str]] = {
    "python": [sys.executable, SURROUNDINGS],
    "module": [sys.executable, "-m", "tests.e2e.programs.surroundings"],
    "torchrun": torchrun(ranks=1, script=SURROUNDINGS),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_script_sees_the_same_in_a_promoted_standby(job: Job, tmp_path: Path, form: str) -> None:
    """What it sets before it imports is honoured; argv, the real __main__, -m, pickling and spawning work."""
    command = [*FORMS[form], str(tmp_path), "--x"]
    job.start(command)
    ready(job, 1)
    seen = json.loads((tmp_path / "seen-0.json").read_text())
    victim = next(p for p in job.processes() if p.environ().get("EVERSTEP_ATTEMPT") == "0" and is_script(p))
    victim.kill()
    recovered(job, 1, standby=True)
    promoted = json.loads((tmp_path / "seen-1.json").read_text())
    assert seen.pop("restart count") == ("0" if form == "torchrun" else None)
    assert promoted.pop("restart count") == ("1" if form == "torchrun" else None)
    assert promoted == seen
    assert seen["threads"] == min(2, os.cpu_count() or 1)
    assert "torch" not in seen["before"]
    assert seen["child"] == [4, "torch", "0", "__mp_main__"]
    assert seen["policies"] == [os.SCHED_OTHER]
    (tmp_path / "enough").touch()
    assert job.wait() == 0, job.output


def is_script(process: psutil.Process) -> bool:
    """Whether this is the worker: the program itself, not torchrun and no child of its own."""
    words = process.cmdline()
    return any(word.endswith("launch/worker") for word in words) and not any("agent.py" in w for w in words)


#: another user, as far as the process can tell: a namespace of users in which nobody has an id
NOBODY = ["unshare", "--user"]


@pytest.mark.parametrize(
    "user",
    [
        "powerless",
        pytest.param(
            "nobody", marks=pytest.mark.may_skip(reason="a container may forbid namespaces of users")
        ),
    ],
)
def test_without_privileges(tmp_path: Path, user: str) -> None:
    """The scheduling policy that the standby waits under can be left again by whoever may do least.

    Root gives up every capability for good (and so CAP_SYS_NICE); another user never had one.
    """
    command = [sys.executable, "-c", WITHOUT_PRIVILEGES, str(tmp_path)]
    if user == "nobody":
        if subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode:
            pytest.skip("no namespaces of users here")
        command = [*NOBODY, *command, "nobody"]
    elif os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    subprocess.run(command, env=harness.environment(), check=True, timeout=harness.DEADLINE, cwd=harness.ROOT)


WITHOUT_PRIVILEGES = """
import os, signal, sys
from pathlib import Path
from tests.e2e import harness, test_standby as t
effective = [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")]
assert int(effective[0], 16) == 0
assert os.geteuid() or len(sys.argv) == 2
with harness.job(Path(sys.argv[1]) / "job") as job:
    job.standby = t.STANDBY
    job.start(t.torchrun("--out", Path(sys.argv[1]) / "out", *t.SLOW, ranks=1), *t.SNAPSHOTS)
    t.ready(job, 1)
    waiting = t.workers(job, 1)
    assert [os.sched_getscheduler(p.pid) for p in waiting] == [os.SCHED_BATCH]
    score = lambda pid: Path(f"/proc/{pid}/oom_score_adj").read_text()
    assert [score(p.pid) for p in [*waiting, waiting[0].parent()]] == ["1000\\n"] * 2
    t.workers(job, 0)[0].kill()
    t.recovered(job, 1, standby=True)
    for process in [*waiting, waiting[0].parent()]:
        assert score(process.pid) == score("self")
        for task in os.listdir(f"/proc/{process.pid}/task"):
            assert os.sched_getscheduler(int(task)) == os.SCHED_OTHER, (process, task)
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    job.until_no_processes()
"""
