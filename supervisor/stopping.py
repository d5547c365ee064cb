"""A stop that was asked for: by whom, and how long it may take."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Final

from supervisor.deadlines import Deadlines
from supervisor.decide.deadline import Deadline
from supervisor.draining import Draining
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.engine import Engine
from supervisor.ledger import Ledger
from supervisor.model import StopCause, StopRequested

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class Stopping:
    """Of one run: at most one stop. ``begun`` is called when there is one, ``end`` when its time is up."""

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
    ) -> None:
        self._ledger, self._console, self._draining = ledger, console, draining
        self._deadlines = Deadlines(engine, ledger, grace, self._on_deadline)
        self._begun, self._end = begun, end
        self._began = (0.0, 0.0)  # Unix, and monotonic
        self._patience = grace  # seconds that the stop may take
        self._time_up: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        #: what was asked for, and by whom
        self.requested: StopRequested | None = None
        #: set once there is a stop
        self.seen = asyncio.Event()
        #: why it was not waited for: ``user`` or ``grace``
        self.cut_short: str | None = None

    def listen(self) -> None:
        """Hear signals (they are blocked so far) and keep deadlines from now on."""
        loop = asyncio.get_running_loop()
        for signum in SIGNALS:
            if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                loop.add_signal_handler(signum, self._on_signal, signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._background(asyncio.create_task(self._deadlines.watch()))

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

    def _begin(self, stop: StopRequested, remark: str) -> None:
        self.requested, self._began = stop, (clock.now(), clock.monotonic())
        self._ledger.add(stop)
        self._limit()
        self._console.say(
            f"{stop.source}: all ranks save the same step and stop; they have {self._patience:.3g} s{remark}"
        )
        self.seen.set()
        self._begun()

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
        task.add_done_callback(self._tasks.discard)
