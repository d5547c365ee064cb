"""What happens by the clock during an attempt: first step seen, save points due, progress told, a stop pursued."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from supervisor import guarding
from supervisor.attempt import Attempt
from supervisor.config import Options
from supervisor.decide import interval
from supervisor.draining import Draining
from supervisor.edge import clock, processes
from supervisor.edge.console import Console
from supervisor.edge.control import Word
from supervisor.ledger import Ledger
from supervisor.live_view import LiveView
from supervisor.lookout import Warnings
from supervisor.model import FirstStep, Progress, ProposalFlag
from supervisor.saves import Agreed
from supervisor.snapshots import Snapshots
from supervisor.vigil import Vigil

PERIOD = 0.1  # seconds
PROGRESS_PERIOD = 10.0  # seconds between two journal entries
RATE_SPAN = 5.0  # seconds over which the shown rate is measured


class Pulse:
    """The clockwork of one attempt."""

    def __init__(
        self,
        attempt: Attempt,
        options: Options,
        ledger: Ledger,
        snapshots: Snapshots,
        draining: Draining,
        savepoints: Agreed,
        console: Console,
        drive_stop: Callable[[], None],
        on_first_step: Callable[[], None],
        warnings: Warnings,
        view: LiveView,
    ) -> None:
        self._attempt, self._options, self._ledger = attempt, options, ledger
        self._snapshots, self._savepoints, self._console = snapshots, savepoints, console
        self._draining, self._warnings, self._view = draining, warnings, view
        self._wants_stop, self._on_first_step = drive_stop, on_first_step
        self._stop_proposed = self._stop_forwarded = False
        now = clock.monotonic()
        self._snapshot_at = self._checkpoint_at = self._progress_at = now
        self._first_step_said = False
        self._rate_from = (now, 0)
        self._rate: float | None = None
        self._stepped = 0, clock.now()  # the slowest rank's steps, and since when
        self._vigil = Vigil(attempt, options, ledger, console)

    async def beat(self) -> None:
        """Run until cancelled."""
        while True:
            await asyncio.sleep(PERIOD)
            self.note_first_step()
            self._note_progress()
            self._want_due_saves()
            self._savepoints.pump()
            self._attempt.reap_adopted()
            self._attempt.offer_slot(self._snapshots.offer_word)
            self._wants_stop()
            self._vigil.look()
            if self._first_step_said:
                self._warnings.look(self._attempt)
                self._view.look(self._attempt)
            if (proven := guarding.proven(self._attempt)) is not None:
                self._draining.proven = proven
            self._console.progress(self._line())

    # ------------------------------------------------------------------ saves

    def saved(self, step: int, flags: ProposalFlag) -> None:
        """Every rank holds ``step``: drain it if that is due."""
        now = clock.monotonic()
        self._snapshot_at = now
        if (
            flags & ProposalFlag.CHECKPOINT
            or step == self._attempt.total_steps
            or self._checkpoint_is_due(step, now)
        ):
            self._checkpoint_at = now
            self._draining.drain()
        else:
            self._draining.retry(now)

    def _want_due_saves(self) -> None:
        if not self._savepoints.is_idle or not self._attempt.in_session:
            return
        now = clock.monotonic()
        seconds = self._options.snapshot_every.seconds
        if seconds is not None and now - self._snapshot_at >= seconds:
            self._snapshot_at = now
            self._savepoints.want(ProposalFlag(0))
        elif self._checkpoint_is_due(None, now):
            self._checkpoint_at = now
            self._savepoints.want(ProposalFlag.CHECKPOINT)

    def _checkpoint_is_due(self, step: int | None, now: float) -> bool:
        every = self._options.checkpoint_every
        if every.steps is not None:
            return step is not None and step % every.steps == 0
        if every.is_auto:
            return now - self._checkpoint_at >= interval.auto(self._ledger.record, self._draining.seconds)
        seconds = every.seconds
        return seconds is not None and now - self._checkpoint_at >= seconds

    # ------------------------------------------------------------------ signs of life

    def note_first_step(self) -> None:
        """Journal the attempt's first step, at the moment the last rank completed it."""
        attempt = self._attempt
        if self._first_step_said or not attempt.is_full:
            return
        times = [seat.page[Word.FIRST_STEP_NS] for seat in attempt.seats.values()]
        others = attempt.others.first_step_times if attempt.others is not None else []
        if all(times) and all(others):
            self._first_step_said = True
            last = max([clock.unix_of(max(times)), *(time for time in others if time is not None)])
            self._rate_from = (clock.monotonic(), min(attempt.steps))
            self._ledger.add(
                FirstStep(
                    time=min(last, clock.now()),
                    attempt=attempt.number,
                    step=min(attempt.steps),
                    total_steps=self._attempt.total_steps,
                    restore_seconds=attempt.restore_seconds,
                )
            )
            self._on_first_step()

    def _note_progress(self) -> None:
        now = clock.monotonic()
        if not self._first_step_said or not self._attempt.is_full:
            return
        step = min(self._attempt.steps)
        since, step_then = self._rate_from
        if now - since >= RATE_SPAN:
            self._rate, self._rate_from = (step - step_then) / (now - since), (now, step)
            self._savepoints.rate = self._rate
        if step != self._stepped[0]:
            self._stepped = step, clock.now()
        if now - self._progress_at >= PROGRESS_PERIOD:
            self._progress_at = now
            self._snapshots.flush_fact()
            self._ledger.add(
                Progress(
                    time=clock.now(),
                    attempt=self._attempt.number,
                    step=step,
                    total_steps=self._attempt.total_steps,
                    metrics=self.metrics,
                    stepped=self._stepped[1],
                )
            )

    @property
    def metrics(self) -> dict[str, float]:
        """As they are; none before the first step."""
        return dict(self._attempt.metrics) if self._first_step_said else {}

    def _line(self) -> str:
        record, steps = self._ledger.record, self._attempt.steps
        if not steps or not self._first_step_said:
            return f"attempt {self._attempt.number}: {record.state}"
        total = f"/{self._attempt.total_steps}" if self._attempt.total_steps else ""
        parts = [f"step {min(steps)}{total}"]
        if self._rate is not None:
            parts.append(f"{self._rate:.3g} steps/s")
        loss = next(iter(self._attempt.seats.values())).page.loss
        if loss == loss:
            parts.append(f"loss {loss:.4g}")
        for name, point in (("snapshot", record.snapshot), ("checkpoint", record.checkpoint)):
            if point is not None:
                parts.append(f"{name} {point.step} ({max(0.0, clock.now() - point.time):.0f} s ago)")
        parts.append(f"attempt {self._attempt.number}")
        return "  ".join(parts)

    # ------------------------------------------------------------------ stopping

    def drive_stop(self) -> None:
        """Pursue a stop that was asked for, by what the workers are doing right now."""
        attempt = self._attempt
        attempt.stopping = True
        if self._stop_proposed or attempt.ended.is_set():
            return
        if attempt.in_session:
            self._stop_proposed = True
            self._savepoints.want(ProposalFlag.STOP | ProposalFlag.CHECKPOINT)
        elif not attempt.seats:
            self.end_attempt()  # still starting: there is nothing to save
        elif not attempt.has_session and not self._stop_forwarded:
            # it may have a handler of its own, and may open a Session yet
            self._stop_forwarded = True
            processes.send([s.pid for s in attempt.seats.values() if s.end is None], signal.SIGTERM)
        # else: restoring, or its loop is over already: it gets the grace period

    def recall_stop(self) -> bool:
        """Forget the stop, if no worker has heard of it yet; returns whether that was so."""
        attempt = self._attempt
        if attempt.ended.is_set() or self._stop_forwarded:
            return False
        if self._stop_proposed and not self._savepoints.recall_stop():
            return False
        self._stop_proposed = attempt.stopping = False
        return True

    def save_soon(self) -> None:
        """Have all ranks save the same step, make it durable, and go on."""
        if self._attempt.in_session:
            self._checkpoint_at = clock.monotonic()
            self._savepoints.want(ProposalFlag.CHECKPOINT)

    def end_attempt(self) -> None:
        """Have the attempt torn down now."""
        self._attempt.ended.set()
