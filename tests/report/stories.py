"""Job directories with long lives in them, written as a supervisor would have written them."""

from __future__ import annotations

import json
import math
import random
import socket
from pathlib import Path

from supervisor.edge.journal import encode
from supervisor.model import (
    Action,
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointsPruned,
    Decided,
    Fact,
    Failure,
    FailureKind,
    FirstStep,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
    SnapshotCompleted,
    StopCause,
    StopRequested,
    Tier,
    WorkersReady,
)

BEGAN = 1_760_000_000.0
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> & "quoted"'
KINDS = (
    FailureKind.CRASH,
    FailureKind.CRASH,
    FailureKind.CUDA_OOM,
    FailureKind.COMMUNICATION,
    FailureKind.HANG,
    FailureKind.EXCEPTION,
)


def job_directory(folder: Path, facts: list[Fact]) -> Path:
    """A job that nobody holds at present."""
    (folder / "journal").mkdir(parents=True)
    (folder / "lock").touch()
    described = {
        "run_id": "4e1f2a7b9c0d3e5f",
        "runtime": str(folder.parent / "runtime"),
        "epoch": 1,
        "identity": "train.py",
        "command": ["torchrun", "--nproc-per-node=8", "train.py"],
        "created": BEGAN,
        "format": 1,
    }
    (folder / "job.json").write_text(json.dumps(described))
    (folder / "journal" / "node.jsonl").write_bytes(b"".join(map(encode, facts)))
    return folder


class Story:
    """Writes facts with a clock of its own."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.time = BEGAN
        self.facts: list[Fact] = []
        self.kept: list[int] = []

    def loss(self, step: int) -> float:
        return 2.1 + 8.9 * math.exp(-step / 9000) + self.random.gauss(0, 0.05)

    def run(self, epoch: int, settings: dict[str, str] | None = None) -> None:
        self.facts.append(
            RunStarted(
                time=self.time, epoch=epoch, host=socket.gethostname(), pid=4711, command=("torchrun", "--nproc-per-node=8", "train.py"),
                version="0.1", max_failures=5, max_preemptions=100,
            )
        )  # fmt: skip

    def attempt(
        self,
        number: int,
        resume: int,
        until: int,
        total: int,
        *,
        every: int,
        pace: float,
        spike: int | None = None,
    ) -> None:
        """One that makes steps from ``resume`` to ``until``."""
        add = self.facts.append
        add(AttemptStarted(time=self.time, attempt=number, standby=number > 0))
        tier = None if resume == 0 else Tier.RAM if number % 7 else Tier.CHECKPOINT
        path = f"/gone/checkpoints/step-{resume:09d}" if tier is Tier.CHECKPOINT else None
        add(Resumed(time=self.time + 0.1, attempt=number, step=resume, tier=tier, path=path))
        add(WorkersReady(time=self.time + 0.2, attempt=number, world_size=8))
        self.time += 25.0 if number == 0 else 1.5
        add(
            FirstStep(time=self.time, attempt=number, step=resume + 1, total_steps=total, restore_seconds=0.4)
        )
        for step in range(resume + 1 + every, until + 1, every):
            self.time += pace * every
            loss = self.loss(step)
            if spike is not None and abs(step - spike) < every:
                loss = math.nan
            metrics = {
                "loss": loss,
                "grad_norm": 0.5 + abs(self.random.gauss(0, 0.2)),
                "lr": 3e-4 * (1 - step / total),
            }
            add(Progress(time=self.time, attempt=number, step=step, total_steps=total, metrics=metrics))
            if step % (20 * every) < every:
                add(
                    SnapshotCompleted(
                        time=self.time,
                        attempt=number,
                        step=step,
                        seconds=0.02,
                        bytes=7_400_000_000,
                        stalled=0.4,
                    )
                )
            if step % (200 * every) < every:
                self.commit(number, step)

    def commit(self, number: int, step: int) -> None:
        path = f"/gone/checkpoints/step-{step:09d}"
        self.facts.append(
            CheckpointCommitted(
                time=self.time, attempt=number, step=step, path=path, seconds=6.5, bytes=7_400_000_000,
                metrics={"loss": self.loss(step)},
            )
        )  # fmt: skip
        self.kept.append(step)
        if len(self.kept) > 3:
            self.facts.append(CheckpointsPruned(time=self.time, steps=(self.kept.pop(0),)))

    def fail(self, number: int, step: int, reason: str, kind: FailureKind = FailureKind.CRASH) -> None:
        noticed = self.time + (60.0 if kind is FailureKind.HANG else 0.5)
        failure = Failure(
            kind=kind, reason=reason, attempt=number, time=noticed, rank=number % 8, step=step,
            signal=9 if kind is FailureKind.CRASH else None,
            exception="RuntimeError: " + reason if kind is FailureKind.EXCEPTION else None,
        )  # fmt: skip
        self.time = noticed + 1.0
        self.facts.append(
            AttemptEnded(time=self.time, attempt=number, step=step, failure=failure, noticed=noticed)
        )
        self.facts.append(
            Decided(time=self.time, attempt=number, action=Action.RESTART, reason=f"restarting now: {reason}")
        )

    def stop(self, number: int, step: int) -> None:
        self.facts.append(StopRequested(time=self.time, cause=StopCause.PREEMPTION, source="SIGTERM"))
        self.time += 4.0
        reason = f"preempted by SIGTERM; state saved at step {step}; run the same command again to carry on"
        self.facts += [
            AttemptEnded(time=self.time, attempt=number, step=step, stopped=True),
            Decided(time=self.time, attempt=number, action=Action.STOP, reason=reason),
            RunEnded(time=self.time, exit_code=75, reason=reason),
        ]

    def finish(self, number: int, step: int) -> None:
        reason = f"finished after all {step} steps"
        self.facts += [
            AttemptEnded(time=self.time, attempt=number, step=step, finished=True),
            Decided(time=self.time, attempt=number, action=Action.COMPLETE, reason=reason),
            RunEnded(time=self.time, exit_code=0, reason=reason),
        ]


def life(*, attempts: int, total: int, every: int, pace: float, seed: int = 0) -> list[Fact]:
    """A job of ``attempts`` attempts that makes ``total`` steps: failures of all kinds, now and then a preemption."""
    story = Story(seed)
    story.run(1)
    epoch, resume, share = 1, 0, total / attempts
    for number in range(attempts):
        last = number == attempts - 1
        until = total if last else max(resume + 2, int((number + 1) * share))
        story.attempt(
            number, resume, until, total, every=every, pace=pace, spike=until - 3 * every if number % 9 == 4 else None
        )  # fmt: skip
        if last:
            story.commit(number, until)
            story.finish(number, until)
        elif number % 10 == 9:
            story.stop(number, until)
            story.time += 600.0
            epoch += 1
            story.run(epoch)
            resume = until
        else:
            kind = KINDS[number % len(KINDS)]
            reason = f"rank {number % 8} broke ({kind}, after step {until})"
            story.fail(number, until, HOSTILE if number == 1 else reason, kind)
            resume = max(0, until - story.random.randrange(int(share / 4) + 1))
            if number % 11 == 3:
                story.facts.append(
                    CheckpointFailed(time=story.time, step=until, reason="No space left on device")
                )
    return story.facts


def evidence(job: Path, attempt: int, *, text: str = "") -> None:
    """A ``failure.json`` as the supervisor writes it."""
    stack = (
        'Current thread 0x00007f1 (most recent call first):\n  File "train.py", line 12 in train_step\n'
        + text
    )
    end = {
        "rank": 1, "pid": 4242, "monotonic": 1.0, "exit_code": 1, "signal": None, "told_exit_code": 1, "step": 17, "closed": False,
        "completed": None, "oom_killed": False, "last_lines": ["[rank1] step 16", text or "[rank1] step 17"],
        "raised": {"type": "RuntimeError", "message": "broke", "traceback": "Traceback (most recent call last):\n" + text, "bases": []},
    }  # fmt: skip
    document = {
        "failure": {},
        "evidence": {
            "ends": [end],
            "launcher_lines": ["torchrun says"],
            "hang": None,
            "stacks": {"0": stack, "1": stack},
        },
    }
    folder = job / "attempts" / f"{attempt:06d}"
    folder.mkdir(parents=True)
    (folder / "failure.json").write_text(json.dumps(document))
