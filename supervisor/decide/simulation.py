"""A training run of weeks in a fraction of a second: the decision core on a clock that is only a number.

What is simulated is the world: when something strikes (given from outside, so that the same strikes can meet different
settings), and how long launching, restoring, noticing and saving take. What is *not* simulated is everstep: the world's events
become the facts that a supervisor would journal; ``lifecycle`` folds them and accounts for every second, ``restart`` gives the
verdicts, with budgets and pauses, and ``interval`` says when a checkpoint is due. So what comes out is what ``everstep status``
would show at the end.

Simplifications: strikes are independent of what the job does, all ranks step alike, a drain takes the same time each time, and
while an attempt is torn down or launched a further strike costs at most its own launch (a cold one: the standby is made beside steps). Snapshots between two other events are told
in one fact with their summed stall, as a supervisor does that takes them faster than it journals. What strikes a job that pauses or
is away takes nothing but memory that is gone anyway.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

from supervisor.decide import goodput, interval, lifecycle, restart
from supervisor.decide.scenario import Blow, Costs, Outcome, Plan, Strike
from supervisor.model import (
    Action,
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
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
    Verdict,
    WorkersReady,
)


def simulate(
    plan: Plan, costs: Costs, strikes: Iterable[Strike], tell: Callable[[Fact], None] | None = None
) -> Outcome:
    """Run it. ``strikes`` in order of time, as many as the run may meet; the same input gives the same outcome.

    ``tell`` hears every fact, as a journal would.
    """
    return _World(plan, costs, strikes, tell).run()


class _World:
    def __init__(
        self, plan: Plan, costs: Costs, strikes: Iterable[Strike], tell: Callable[[Fact], None] | None
    ) -> None:
        self._plan, self._costs, self._tell = plan, costs, tell
        self._strikes: Iterator[Strike] = iter(strikes)
        self._strike = next(self._strikes, None)
        self._end = math.inf if plan.seconds is None else plan.seconds
        self._record = lifecycle.NEW_JOB
        self._now = 0.0
        self._epochs = itertools.count(1)
        self._checkpoints = 0
        self._memory: int | None = None  # the step of the newest snapshot in host memory
        self._durable: int | None = None
        self._draining: tuple[int, float] | None = None  # a step, and when it will be durable
        self._drain_again = False  # a newer snapshot waits for the drain to end
        self._cold = True  # the next launch is not by a standby
        self._wait = 0.0  # before the next launch can begin
        # of the current attempt
        self._begun = 0.0  # when its first step began
        self._ready = math.inf  # when the next one waits as a standby
        self._from = self._reached = 0  # the step it resumed at, and the furthest one asked for since
        self._stalled = 0.0
        self._snapshot_at = self._checkpoint_at = 0.0

    def run(self) -> Outcome:
        self._start()
        while self._now < self._end:
            verdict = self._attempt()
            if verdict is None:
                break
            if verdict.action is Action.STOP:
                self._add(RunEnded(time=self._now, exit_code=75, reason=verdict.reason))
                self._sleep(self._costs.away)
                if self._now < self._end:
                    self._start()
            elif verdict.action is Action.RESTART:
                self._cold = self._cold or verdict.delay > 0
                self._sleep(verdict.delay)
            else:
                self._add(RunEnded(time=self._now, exit_code=1, reason=verdict.reason))
                break
        record = goodput.advance(self._record, self._now)
        return Outcome(record=record, seconds=self._now, checkpoints=self._checkpoints)

    # ------------------------------------------------------------------ one attempt

    def _attempt(self) -> Verdict | None:
        """Its verdict; None: the run is over."""
        number = 0 if self._record.attempt is None else self._record.attempt + 1
        self._add(AttemptStarted(time=self._now, attempt=number, standby=not self._cold))
        restoring = self._resume(number)
        launching = self._wait + (self._costs.startup if self._cold else self._costs.relaunch)
        self._begun, self._ready = self._now + launching + restoring, math.inf
        first = self._begun + self._costs.step
        if self._strike is not None and self._strike.time < first:
            return self._struck(number, self._take(), step=None)
        if first >= self._end:
            self._until(self._end)
            return None
        self._until(first)
        self._wait, self._cold, self._ready = 0.0, False, first + self._costs.standby
        self._stalled, self._reached = 0.0, self._from
        self._snapshot_at = self._checkpoint_at = self._begun
        self._add(WorkersReady(time=first, attempt=number, world_size=1))
        self._add(
            FirstStep(
                time=first, attempt=number, step=self._from + 1, total_steps=self._plan.steps,
                restore_seconds=restoring,
            )
        )  # fmt: skip
        return self._train(number)

    def _resume(self, number: int) -> float:
        """Choose the nearest newest state; returns the seconds that reading it back takes."""
        places = [
            (self._memory, Tier.RAM, self._costs.restore),
            (self._durable, Tier.CHECKPOINT, self._costs.fetch),
        ]
        known = [
            (step, -rank, tier, cost) for rank, (step, tier, cost) in enumerate(places) if step is not None
        ]
        step, _, tier, cost = max(known, key=lambda one: one[:2]) if known else (0, 0, None, 0.0)
        self._from = step
        path = None if tier is None else f"step-{step}"
        self._add(Resumed(time=self._now, attempt=number, step=step, tier=tier, path=path))
        return cost

    def _train(self, number: int) -> Verdict | None:
        while True:
            finish = self._finish()
            strike = math.inf if self._strike is None else self._strike.time
            due = self._checkpoint_due()
            event = min(finish, strike, due, self._end)
            self._snapshots_until(number, event)
            if self._finish() > finish:  # the snapshots on the way took their time
                continue
            self._until(event)
            if event == strike:
                return self._struck(number, self._take(), step=self._step_at(event))
            if event == finish:
                self._finished(number)
                return None
            if event == self._end:
                self._add(Progress(time=event, attempt=number, step=self._step_at(event)))
                return None
            self._checkpoint_at = event
            self._snapshot(number)
            self._drain()

    def _finish(self) -> float:
        if self._plan.steps is None:
            return math.inf
        return self._begun + self._stalled + (self._plan.steps - self._from) * self._costs.step

    def _finished(self, number: int) -> None:
        """The end of the run."""
        self._snapshot(number)
        self._drain()
        while self._draining is not None:
            self._until(self._draining[1])
        done = self._plan.steps
        self._add(AttemptEnded(time=self._now, attempt=number, step=done, total_steps=done, finished=True))
        verdict = restart.decide_finished(self._record)
        self._decided(number, verdict)
        self._add(RunEnded(time=self._now, exit_code=0, reason=verdict.reason))

    def _step_at(self, time: float) -> int:
        step = self._from + int((time - self._begun - self._stalled) / self._costs.step + 1e-9)
        self._reached = max(self._reached, step if self._plan.steps is None else min(step, self._plan.steps))
        return self._reached  # what falls into the stall of a snapshot finds no step undone

    # ------------------------------------------------------------------ saving

    def _checkpoint_due(self) -> float:
        every = self._plan.checkpoint_every
        if every is None:
            return math.inf
        if isinstance(every, str):
            every = interval.auto(self._record, self._costs.drain if self._checkpoints else None)
        return max(self._now, self._checkpoint_at + every)

    def _snapshots_until(self, number: int, time: float) -> None:
        """Those of ``--snapshot-every`` up to ``time``, in one fact."""
        every = self._plan.snapshot_every
        if every is None:
            return
        every = max(every, self._costs.step + self._costs.stall)
        count = math.floor((time - self._snapshot_at) / every)
        if count > 0:
            self._until(self._snapshot_at + count * every)
            self._snapshot(number, count)

    def _snapshot(self, number: int, count: int = 1) -> None:
        stall = self._costs.stall
        self._stalled += (count - 1) * stall
        step = self._step_at(self._now)
        self._stalled += stall
        self._snapshot_at, self._memory = self._now, step
        self._add(
            SnapshotCompleted(
                time=self._now, attempt=number, step=step, seconds=stall, bytes=0, stalled=count * stall
            )
        )

    def _drain(self) -> None:
        """Make the newest snapshot durable: one at a time, and the newest wins."""
        if self._draining is not None:
            self._drain_again = True
        elif self._memory is not None and self._memory != self._durable:
            self._draining = self._memory, self._now + self._costs.drain

    # ------------------------------------------------------------------ what strikes

    def _take(self) -> Strike:
        strike = self._strike
        assert strike is not None
        self._strike = next(self._strikes, None)
        return strike

    def _struck(self, number: int, strike: Strike, step: int | None) -> Verdict | None:
        if strike.time >= self._end:
            self._until(self._end)
            return None
        self._until(max(self._now, strike.time))
        if step is not None:
            self._add(Progress(time=self._now, attempt=number, step=step))
        if strike.blow is Blow.PREEMPTION:
            return self._preempted(number, step)
        hangs = strike.blow is Blow.HANG
        noticed = self._now + (self._costs.hang_detection if hangs else self._costs.detection)
        self._cold = noticed < self._ready
        if strike.blow is Blow.NODE:
            self._lose_memory()
            self._wait, self._cold = self._costs.replacement, True
        self._until(noticed + self._costs.teardown)
        kinds = {Blow.HANG: FailureKind.HANG, Blow.NODE: FailureKind.NODE_LOST}
        failure = Failure(
            kind=kinds.get(strike.blow, FailureKind.CRASH), reason=f"a {strike.blow} failure", attempt=number,
            time=noticed, step=step,
        )  # fmt: skip
        self._add(AttemptEnded(time=self._now, attempt=number, step=step, failure=failure, noticed=noticed))
        return self._decided(number, restart.decide(self._record, failure))

    def _preempted(self, number: int, step: int | None) -> Verdict:
        stop = StopRequested(time=self._now, cause=StopCause.PREEMPTION, source="a notice")
        self._add(stop)
        if step is not None:
            self._snapshot(number)
            self._drain()
        while self._draining is not None:
            self._until(self._draining[1])
        self._add(AttemptEnded(time=self._now, attempt=number, step=step, stopped=True))
        self._memory, self._cold = None, True
        return self._decided(number, restart.decide_stop(self._record, stop))

    def _lose_memory(self) -> None:
        self._draining, self._drain_again = None, False
        if not self._plan.peers:
            self._memory = None

    # ------------------------------------------------------------------ the clock

    def _start(self) -> None:
        limits = self._plan.limits
        self._add(
            RunStarted(
                time=self._now, epoch=next(self._epochs), host="", pid=0, command=(), version="",
                max_failures=limits.max_failures, max_preemptions=limits.max_preemptions,
            )
        )  # fmt: skip

    def _sleep(self, seconds: float) -> None:
        """Let time pass in which nothing runs."""
        self._until(min(self._end, self._now + seconds))
        while self._strike is not None and self._strike.time < self._now:
            if self._take().blow is Blow.NODE:
                self._lose_memory()
                self._wait, self._cold = self._costs.replacement, True

    def _until(self, time: float) -> None:
        """Let the clock run to ``time``, and drains end on the way."""
        while self._draining is not None and self._draining[1] <= time:
            step, done = self._draining
            self._now = max(self._now, done)
            self._draining, self._durable = None, step
            self._checkpoints += 1
            self._add(
                CheckpointCommitted(
                    time=self._now, attempt=self._record.attempt or 0, step=step, path=f"step-{step}",
                    seconds=self._costs.drain, bytes=0,
                )
            )  # fmt: skip
            if self._drain_again:
                self._drain_again = False
                self._drain()
        self._now = max(self._now, time)

    def _decided(self, number: int, verdict: Verdict) -> Verdict:
        self._add(
            Decided(
                time=self._now,
                attempt=number,
                action=verdict.action,
                reason=verdict.reason,
                delay=verdict.delay,
            )
        )
        return verdict

    def _add(self, fact: Fact) -> None:
        self._record = lifecycle.apply(self._record, fact)
        if self._tell is not None:
            self._tell(fact)
