"""A real training on a machine that its cloud is going to take: each cloud's service is emulated, all else is real."""

from __future__ import annotations

from pathlib import Path

from launch.notices.metadata import ENVIRONMENT
from supervisor.model import (
    CheckpointCommitted,
    DeadlineSet,
    Effect,
    FirstStep,
    NoticeReceived,
    NoticeWithdrawn,
    Resumed,
    State,
    StopRequested,
)
from tests.e2e.harness import Job, digests, python, torchrun
from tests.notices.emulators import Answer, Asked, AwsEmulator, AzureEmulator, GcpEmulator

SLOW = ("--pause", "0.05")
ENDLESS = ("--steps", 100_000, *SLOW)
SNAPSHOTS = ("--snapshot-every", "never", "--checkpoint-every", "never")


def test_aws_takes_the_instance_and_the_next_one_carries_on(
    job: Job, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    out = tmp_path / "out"
    aws = AwsEmulator()
    with aws.serving():
        job.environ = {ENVIRONMENT: aws.url}
        # 30 steps of a second: it is asked every 5 s
        job.start(torchrun("--out", out, "--pause", "1"), *SNAPSHOTS, "--notices", "aws")
        first: FirstStep = job.until_fact(FirstStep)
        aws.interrupt("terminate", 120)
        assert job.wait() == 75, job.output
    record = job.record
    assert record.state is State.PREEMPTED
    assert record.stop is not None
    assert record.stop.source == "AWS spot: terminate"
    assert record.stop.deadline is not None
    assert record.checkpoint is not None
    assert record.checkpoint.step >= first.step
    assert "the same command" in job.output
    saved = record.checkpoint.step

    job.environ = {ENVIRONMENT: "http://127.0.0.1:9"}  # where nobody answers: that disturbs nothing
    assert job.run(torchrun("--out", out), "--notices", "aws") == 0, job.output
    assert [fact.step for fact in job.facts(Resumed)] == [0, saved]
    assert job.record.lost_steps == 0
    assert digests(out) == undisturbed


def test_gcp_warns_takes_back_and_preempts(job: Job, tmp_path: Path) -> None:
    gcp = GcpEmulator()
    with gcp.serving():
        job.environ = {ENVIRONMENT: gcp.url}
        job.start(python("--out", tmp_path / "out", *ENDLESS), *SNAPSHOTS, "--notices", "gcp")
        job.until_fact(FirstStep)
        gcp.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        job.until_fact(CheckpointCommitted)  # and goes on
        gcp.set("maintenance-event", "NONE")
        job.until_fact(NoticeWithdrawn)
        gcp.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        job.until_fact(NoticeReceived, lambda fact: fact.effect is Effect.LEAVE)
        job.until_fact(DeadlineSet)
        job.until(lambda: job.record.deadline)
        assert job.status()["deadline"] is not None
        gcp.set("maintenance-event", "NONE")
        job.until(lambda: len(job.facts(NoticeWithdrawn)) == 2 or None)
        assert job.record.deadline is None
        assert job.facts(StopRequested) == []
        gcp.set("preempted", "TRUE")
        assert job.wait() == 75, job.output
    stop = job.record.stop
    assert stop is not None
    assert stop.source == "GCP preemption"
    assert job.record.checkpoint is not None
    assert not any(fact.too_late for fact in job.facts(NoticeWithdrawn))


def test_azure_may_have_the_machine_once_the_state_is_durable(job: Job, tmp_path: Path) -> None:
    committed: list[bool] = []

    class Watching(AzureEmulator):
        async def answer(self, asked: Asked) -> Answer:
            if asked.method == "POST":
                committed.append(bool(list(job.folder.glob("checkpoints/step-*/everstep.json"))))
                committed.append(not job.processes()[1:])  # the supervisor alone is left, if that
            return await super().answer(asked)

    azure = Watching()
    with azure.serving():
        job.environ = {ENVIRONMENT: azure.url}
        job.start(python("--out", tmp_path / "out", *ENDLESS), *SNAPSHOTS, "--notices", "azure")
        job.until_fact(FirstStep)
        azure.schedule("Preempt", 30, resources=("trainer_7",))
        asked = len(azure.asked)
        job.until(lambda: len(azure.asked) > asked + 1 or None)
        assert job.facts(NoticeReceived) == [], "that was for another machine"
        azure.schedule("Preempt", 30)
        assert job.wait() == 75, job.output
    assert committed == [True, True]
    assert azure.started == [azure.events[0]["EventId"]]
    assert "acknowledged" in job.output


def test_a_wrong_source_or_address_is_refused(job: Job, tmp_path: Path) -> None:
    assert job.run(python("--out", tmp_path / "out"), "--notices", "moon") == 78
    assert "--notices: 'moon'; allowed: auto, aws, gcp, azure, slurm, none" in job.output
    job.environ = {ENVIRONMENT: "169.254.169.254"}
    assert job.run(python("--out", tmp_path / "out"), "--notices", "aws") == 78
    assert "http://HOST:PORT is required" in job.output
