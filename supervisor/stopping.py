"""A stop that was asked for: by whom, how long it may take, and what can be saved in that time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Final

from supervisor.deadlines import Deadlines
from supervisor.decide import notices
from supervisor.decide.deadline import Deadline
from supervisor.decide.notices import Notice, Plan
from supervisor.draining import Draining
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.engine import Engine
from supervisor.ledger import Ledger
from supervisor.model import StopCause, StopRequested, StopWithdrawn
from supervisor.noticing import Noticing, Source, means

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class Stopping:
    """Of one run: at most one stop at a time.

    ``begun`` is called when there is one, ``end`` when its time is up, ``recalled`` to take it back (it returns whether that
    could be done), ``save`` to have a checkpoint made soon.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        console: Console,
        draining: Draining,
        grace: float,
        *,
        begun: Callable[[], None],
        end: Callable[[], None],
        recalled: Callable[[], bool],
        save: Callable[[], None],
        source: Source | None = None,
    ) -> None:
        self._ledger, self._console, self._draining = ledger, console, draining
        self._deadlines = Deadlines(engine, ledger, grace, self._on_deadline)
        self._begun, self._end, self._recalled, self.save = begun, end, recalled, save
        self._noticing = Noticing(source, self, ledger, console)
        self._began = (0.0, 0.0)  # Unix, and monotonic
        self._patience = grace  # seconds that the stop may take
        self._time_up: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        #: what was asked for, and by whom
        self.requested: StopRequested | None = None
        #: set once there is a stop
        self.seen = asyncio.Event()
        #: why it was not waited for: ``user``, ``grace``, or ``plan``: there is no time for a new snapshot
        self.cut_short: str | None = None

    def listen(self) -> None:
        """Hear signals (they are blocked so far) and keep deadlines from now on."""
        loop = asyncio.get_running_loop()
        for signum in SIGNALS:
            if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                loop.add_signal_handler(signum, self._on_signal, signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._background(asyncio.create_task(self._deadlines.watch()))
        self._background(asyncio.create_task(self._noticing.watch()))

    def time_left(self, at_most: float) -> float | None:
        """Seconds that whoever is told of the end may take; None: as long as it may at any time."""
        if self.cut_short == "user":
            return 0.0
        deadline = self._draining.deadline
        return None if deadline is None else min(at_most, max(1.0, deadline - clock.monotonic()))

    async def acknowledge(self) -> None:
        """All is saved and everybody has left: whoever gave notice need not wait."""
        await self._noticing.acknowledge()

    # ------------------------------------------------------------------ who asks for it

    def _on_signal(self, signum: signal.Signals) -> None:
        if self.requested is None:
            cause = StopCause.USER if signum is signal.SIGINT else StopCause.PREEMPTION
            again = "; Ctrl-C again stops at once" if cause is StopCause.USER else ""
            self._begin(StopRequested(time=clock.now(), cause=cause, source=signum.name), again)
        elif signum is signal.SIGINT:
            self._console.say("stopping at once")
            self._end_now("user")
            return
        self._background(asyncio.create_task(self._learn_deadline()))

    def _on_deadline(self, deadline: Deadline) -> None:
        if self.requested is None:
            now, cause = clock.now(), StopCause.PREEMPTION
            left = f" (in {max(0.0, deadline.end - now):.0f} s)"
            self._begin(
                StopRequested(time=now, cause=cause, source=deadline.source, deadline=deadline.end), left
            )

    def hear(self, standing: tuple[Notice, ...]) -> None:
        """These notices stand."""
        self._deadlines.hear(notices.deadline(standing))
        if self.requested is not None:
            self._limit()

    def heed(self, notice: Notice) -> None:
        """A notice that asks for a stop now."""
        if self.requested is None:
            cause = StopCause.PREEMPTION
            self._begin(
                StopRequested(time=clock.now(), cause=cause, source=notice.source, deadline=notice.deadline),
                "",
            )

    def ask(self, cause: StopCause, source: str, deadline: float | None = None) -> None:
        """Somebody else than a signal, the engine or a cloud asks for a stop."""
        if self.requested is None:
            self._begin(StopRequested(time=clock.now(), cause=cause, source=source, deadline=deadline), "")

    def recall(self, source: str) -> bool | None:
        """The stop that ``source`` asked for is needless: whether it was taken back; None: it asked for none."""
        if self.requested is None or self.requested.source != source:
            return None
        if self.cut_short or not self._recalled():
            return False
        if self._time_up is not None:
            self._time_up.cancel()
        self._ledger.add(StopWithdrawn(time=clock.now(), source=source))
        self.requested = self._draining.deadline = None
        self.seen.clear()
        self._background(asyncio.create_task(self._deadlines.watch()))
        return True

    # ------------------------------------------------------------------ the time it has

    def _begin(self, stop: StopRequested, remark: str) -> None:
        self.requested, self._began = stop, (clock.now(), clock.monotonic())
        self._ledger.add(stop)
        self._limit()
        timed = stop.cause is StopCause.PREEMPTION and self._deadlines.nearest is not None
        plan = notices.plan(self._patience if timed else None, means(self._ledger, self._draining))
        self._console.say(
            f"{stop.source}: {plan.value} and stop; they have {self._patience:.3g} s{remark}"
            if plan is Plan.SAVE
            else f"{stop.source}: {self._patience:.3g} s are too short for a new snapshot; {plan.value}"
        )
        self.seen.set()
        self._begun()
        if plan is not Plan.SAVE:
            self._end_now("plan")

    async def _learn_deadline(self) -> None:
        """A signal says nothing of the time that is left; the engine may."""
        deadline, before = await self._deadlines.look(), self._patience
        if deadline is not None:
            self._limit()
            if self._patience < before - 1:
                self._console.say(f"{deadline.source}: they have {self._patience:.3g} s only")

    def _limit(self) -> None:
        """The stop may take as long as the deadline allows that is known now, counted from its beginning."""
        unix, monotonic = self._began
        self._patience = self._deadlines.patience(unix)
        self._draining.deadline = monotonic + self._patience
        if self._time_up is not None:
            self._time_up.cancel()
        left = self._draining.deadline - clock.monotonic()
        self._time_up = asyncio.get_running_loop().call_later(left, self._end_now, "grace")

    def _end_now(self, why: str) -> None:
        self.cut_short = self.cut_short or why
        if why == "user":
            self._draining.cancel()
        self._end()

    def _background(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)  # the loop itself would forget it
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # a bug of ours must not end the training; but deadlines and notices may not be seen any more
            self._console.say(
                f"unexpected {type(error).__name__} in what watches for the end of the job: {error}"
            )
