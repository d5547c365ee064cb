"""On a real SLURM cluster: whatever it does to a job, no step is lost, and the job ends as it should."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from supervisor.model import DeadlineSet, Resumed, State, StopRequested
from tests.e2e.conftest import STEPS
from tests.e2e.harness import digests
from tests.slurm import jobs, lab
from tests.slurm.jobs import Story

#: one cluster, in one process of several; SLURM's own waits (a time limit of a minute) make these tests long
pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(600)]


class Stories:
    """Every story, told side by side from the first test on."""

    def __init__(self, one: lab.Lab, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.lab = one
        self._told: dict[str, tuple[Story, Future[None]]] = {}
        self._first = Story(one, folder / jobs.STORIES[0].__name__)
        for tell in jobs.STORIES:
            story = Story(one, folder / tell.__name__) if self._told else self._first
            story.folder.mkdir()
            self._told[tell.__name__] = story, pool.submit(self._tell, tell, story)

    def _tell(self, tell: Callable[[Story], None], story: Story) -> None:
        if story is not self._first:
            self._first.until_it_steps()
        tell(story)

    def __getitem__(self, name: str) -> Story:
        story, future = self._told[name]
        future.result()
        return story

    def close(self) -> None:
        for story, _ in self._told.values():
            for file in story.folder.rglob("everstep-runs/*/job.json"):
                for runtime in in_memory(jobs.harness.Job(file.parent)):
                    shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    with lab.running() as one, ThreadPoolExecutor(len(jobs.STORIES)) as pool:
        told = Stories(one, tmp_path_factory.mktemp("slurm"), pool)
        yield told
        told.close()


def test_the_doctor_knows_the_cluster(stories: Stories) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "doctor", "--json"], env=stories.lab.environment, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    found = {one["check"]: one for one in json.loads(result.stdout)}
    assert found["slurm requeue"]["level"] == "ok"
    assert found["slurm KillWait"]["found"].startswith(f"{lab.KILL_WAIT} s")
    assert found["slurm preemption"]["found"] == f"REQUEUE, GraceTime {lab.GRACE} s"
    assert found["slurm ProctrackType"]["level"] == "warning"
    assert found["slurm time limit"]["found"].startswith("60 min")
    assert found["slurm /dev/shm"]["level"] == "ok"


def in_memory(job: jobs.harness.Job) -> list[Path]:
    """What any node has in memory of a job."""
    name = job.runtime.name.partition("@")[0]
    return [path for path in job.runtime.parent.glob(f"{name}*") if path.name.partition("@")[0] == name]


def check_finished(story: Story) -> None:
    """It ended well, in more than one allocation, and no step was done twice."""
    assert (story.shown["JobState"], story.shown["ExitCode"]) == ("COMPLETED", "0:0"), story.log
    record = story.job.record
    assert record.state is State.COMPLETED, story.log
    assert record.preemptions >= 1
    assert record.lost_steps == 0
    resumed = [fact.step for fact in story.job.facts(Resumed)]
    assert resumed[0] == 0
    assert resumed[-1] > 0, "nothing was saved at the stop"
    assert not in_memory(story.job)


@pytest.mark.parametrize("name", ["preemption", "limit"])
def test_it_is_requeued_once_and_ends_on_the_same_bits(
    stories: Stories, undisturbed: dict[str, str], name: str
) -> None:
    story = stories[name]
    check_finished(story)
    assert digests(story.out) == undisturbed
    assert story.log.count(f"SLURM job {story.number} requeued") == story.job.record.preemptions
    assert int(story.shown["Restarts"]) == story.job.record.preemptions
    if name == "preemption":
        assert "a preemption by SLURM" in {fact.source for fact in story.job.facts(DeadlineSet)}
    else:
        stop = story.job.facts(StopRequested)[0]
        assert stop.source == "SLURM's time limit"
        assert stop.deadline is not None
        assert stop.deadline > stop.time


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("at_once", "SIGTERM", "SLURM has requeued the job"),
        ("user_signal", "SIGUSR2", "SLURM job {} requeued"),
    ],
)
def test_preempted_without_a_grace_or_by_a_signal_of_its_own(
    stories: Stories, name: str, source: str, said: str
) -> None:
    story = stories[name]
    check_finished(story)
    assert story.shown["Restarts"] == "1"
    assert [stop.source for stop in story.job.facts(StopRequested)] == [source]
    assert story.log.count(said.format(story.number)) == 1
    assert digests(story.out) == digests(stories["chain"].out), (
        "stopped elsewhere, and ended on the same bits"
    )


def test_slurms_daemons_come_and_go_and_two_nodes_are_requeued(
    stories: Stories, undisturbed: dict[str, str]
) -> None:
    story = stories["restarts"]
    check_finished(story)
    assert digests(story.out) == undisturbed
    assert story.shown["Restarts"] == "1"
    assert story.log.count("SLURM has requeued the job") == 1, "by the node that leads alone"
    assert len(story.job.facts(Resumed)) == 2, "nothing else has ended an attempt"
    assert [file.name for file in (story.job.folder / "journal").glob("*.jsonl")] == ["n1.jsonl"]


def test_with_no_kill_a_lost_node_costs_only_itself(stories: Stories) -> None:
    story = stories["lost"]
    assert (story.shown["JobState"], story.shown["ExitCode"]) == ("COMPLETED", "0:0"), story.log
    assert story.shown["Restarts"] == "0"
    record = story.job.record
    assert (record.state, record.step, record.world_size) == (State.COMPLETED, STEPS, 1)
    assert record.lost_steps <= 1
    assert story.job.facts(Resumed)[-1].step > 0
    assert not in_memory(story.job)


def test_else_slurm_runs_the_job_again_which_resumes(stories: Stories, undisturbed: dict[str, str]) -> None:
    story = stories["lost"].beside
    assert story is not None
    assert (story.shown["JobState"], story.shown["ExitCode"]) == ("COMPLETED", "0:0"), story.log
    assert story.shown["Restarts"] == "1"
    assert story.job.facts(Resumed)[-1].step > 0
    assert digests(story.out) == undisturbed
    assert not in_memory(story.job)


def test_an_operators_requeue_is_not_answered_by_another(stories: Stories) -> None:
    story = stories["requeue"]
    check_finished(story)
    assert story.shown["Restarts"] == "1"
    assert "SLURM has requeued the job" in story.log


def test_a_cancelled_job_is_saved_and_not_requeued(stories: Stories) -> None:
    story = stories["cancel"]
    assert story.shown["Restarts"] == "0"
    assert "the job was cancelled, so it is not requeued" in story.log
    record = story.job.record
    assert record.state is State.PREEMPTED
    assert record.checkpoint is not None
    assert record.checkpoint.step > 0
    assert not story.job.runtime.exists()


def test_of_a_job_that_was_killed_nothing_stays_in_memory(stories: Stories) -> None:
    story = stories["killed"]
    assert story.shown["ExitCode"] == "137:0", story.log
    assert not story.job.runtime.exists()


def test_where_everstep_has_no_scontrol_the_template_requeues(stories: Stories) -> None:
    story = stories["container"]
    check_finished(story)
    assert story.shown["Restarts"] == "1"
    assert "there is no scontrol here" in story.log


def test_a_chain_goes_on_where_requeueing_is_forbidden(stories: Stories) -> None:
    story = stories["chain"]
    check_finished(story)
    assert story.shown["Restarts"] == "0"
    assert story.shown["Requeue"] == "0"
    assert story.job.record.step == STEPS
