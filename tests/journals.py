"""Journals as a real run could write them, for property tests: attempts that work, fail, are stopped, or are cut off."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from supervisor.decide import lifecycle, restart, rollback
from supervisor.model import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    DeadlineSet,
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
    StatesCondemned,
    StopCause,
    StopRequested,
    Tier,
    Verdict,
    WorkersReady,
)
from supervisor.record import JobRecord

TOTAL = 200


class KilledError(Exception):
    """The supervisor is killed."""


class _Author:
    """Writes facts and folds them as it goes; any fact may be the last one of its run."""

    def __init__(self, draw: Callable[..., object]) -> None:
        self.draw = draw
        self.time = 1_000_000.0
        self.facts: list[Fact] = []
        self.record = JobRecord()
        self.in_ram: int | None = None
        self.durable: int | None = None

    def number(self, least: int, most: int) -> int:
        value = self.draw(st.integers(least, max(least, most)))
        assert isinstance(value, int)
        return value

    def chance(self, one_in: int) -> bool:
        return self.number(1, one_in) == one_in

    def tick(self) -> float:
        self.time += self.number(-1, 40) / 4  # a wall clock can be set back
        return self.time

    def write(self, fact: Fact) -> None:
        self.facts.append(fact)
        self.record = lifecycle.apply(self.record, fact)
        if self.chance(40):
            raise KilledError

    def run(self, epoch: int) -> None:
        self.write(
            RunStarted(
                time=self.tick(),
                epoch=epoch,
                host="node-0",
                pid=100 + epoch,
                command=("torchrun", "train.py"),
                version="0.1",
                max_failures=self.number(0, 3),
                max_preemptions=self.number(0, 3),
                guard="nan" if self.chance(2) else "off",
                guard_times=self.number(0, 2),
                guard_skip=self.number(0, 20),
            )
        )
        while True:
            verdict = self.attempt(-1 if self.record.attempt is None else self.record.attempt)
            self.write(
                Decided(
                    time=self.tick(),
                    attempt=self.record.attempt or 0,
                    action=verdict.action,
                    reason=verdict.reason,
                    delay=verdict.delay,
                    rollback=verdict.rollback,
                    skip=verdict.skip,
                    level=verdict.level,
                )
            )
            if not verdict.action.goes_on:
                code = restart.exit_code(verdict.action, self.record.stop)
                self.write(RunEnded(time=self.tick(), exit_code=code, reason=verdict.reason))
                return

    def attempt(self, previous: int) -> Verdict:
        number = previous + 1
        self.write(AttemptStarted(time=self.tick(), attempt=number))
        step = self.resume(number)
        if self.chance(6):
            return self.fail(number, None, FailureKind.EXCEPTION)
        self.write(WorkersReady(time=self.tick(), attempt=number, world_size=2))
        step += 1
        self.write(FirstStep(time=self.tick(), attempt=number, step=step, total_steps=TOTAL))
        while step < TOTAL:
            self.save(number, step)
            if self.chance(8):
                return self.fail(number, step + self.number(0, 2), self.kind())
            if self.chance(8):
                return self.stop(number, step)
            step = min(TOTAL, step + self.number(1, 80))
            self.write(Progress(time=self.tick(), attempt=number, step=step, total_steps=TOTAL))
        self.write(AttemptEnded(time=self.tick(), attempt=number, step=step, finished=True))
        return restart.decide_finished(self.record)

    def resume(self, number: int) -> int:
        if self.chance(4):
            self.in_ram = None  # the host was replaced
        if self.chance(10):
            self.durable = None  # damaged
        tier = Tier.RAM if self.in_ram is not None else Tier.CHECKPOINT if self.durable is not None else None
        step = self.in_ram if self.in_ram is not None else self.durable or 0
        step = min(step, TOTAL - 1)
        path = "checkpoints/step" if tier is Tier.CHECKPOINT else None
        self.write(Resumed(time=self.tick(), attempt=number, step=step, tier=tier, path=path))
        return step

    def save(self, number: int, step: int) -> None:
        if self.chance(2):
            self.in_ram = step
            self.write(
                SnapshotCompleted(time=self.tick(), attempt=number, step=step, seconds=0.1, bytes=1 << 20)
            )
            if self.chance(2):
                self.durable = step
                self.write(
                    CheckpointCommitted(
                        time=self.tick(), attempt=number, step=step, path="checkpoints/step", seconds=1.0, bytes=1 << 20
                    )
                )  # fmt: skip

    def kind(self) -> FailureKind:
        kind = self.draw(st.sampled_from(FailureKind))
        assert isinstance(kind, FailureKind)
        return kind

    def fail(self, number: int, step: int | None, kind: FailureKind) -> Verdict:
        exception = f"ValueError: case {self.number(0, 1)}" if self.chance(2) else None
        time = self.tick()
        failure = Failure(
            kind=kind,
            reason="rank 0 broke",
            attempt=number,
            time=time,
            rank=0,
            step=step,
            exception=exception,
        )
        noticed = time - self.number(-1, 8) / 4 if self.chance(2) else None
        metrics = {"loss": 1.0} if step is not None else {}
        self.write(
            AttemptEnded(
                time=time, attempt=number, step=step, failure=failure, noticed=noticed, metrics=metrics
            )
        )
        if (planned := rollback.plan(self.record, failure)) is not None:
            bad = planned.bad_from
            self.write(StatesCondemned(time=time, attempt=number, step=bad, reason=failure.reason))
            self.in_ram = None if self.in_ram is not None and self.in_ram >= bad else self.in_ram
            self.durable = None if self.durable is not None and self.durable >= bad else self.durable
        return restart.decide(self.record, failure)

    def stop(self, number: int, step: int) -> Verdict:
        cause = StopCause.USER if self.chance(2) else StopCause.PREEMPTION
        if self.chance(2):
            self.write(DeadlineSet(time=self.tick(), source="a limit", deadline=1e6))
        stop = StopRequested(time=self.tick(), cause=cause, source="SIGTERM")
        self.write(stop)
        self.save(number, step)
        self.write(AttemptEnded(time=self.tick(), attempt=number, step=step, stopped=True))
        return restart.decide_stop(self.record, stop)


@st.composite
def journals(draw: Callable[..., object]) -> list[Fact]:
    """Up to four runs of one job."""
    author = _Author(draw)
    for epoch in range(1, author.number(1, 4) + 1):
        try:
            author.run(epoch)
        except KilledError:
            author.time += author.number(0, 10_000)
    return author.facts
