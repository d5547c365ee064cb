"""Hears what asks this node to leave, whatever its part in the job is: signals, and its own machine's notices.

Who leads the job here answers it (``attend``); on a node that follows the leader is told, by its report. What was heard outlives the change
of a node's part: one that comes to lead answers what it heard before, one that leads no more tells the next leader, or leaves.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Final, Protocol

from supervisor.decide import notices
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.fleet import Notice
from supervisor.model import Effect, StopCause
from supervisor.noticing import Source

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
ACKNOWLEDGE: Final = 5.0  # seconds that an acknowledgement may take, when nothing else is left to be done


class Ear(Protocol):
    """Who leads the job, and answers: ``Stopping``."""

    def on_signal(self, signum: signal.Signals) -> None:
        """A signal has come."""
        ...

    def on_notices(self, standing: tuple[notices.Notice, ...]) -> None:
        """These notices of this machine stand now."""
        ...


class Warden:
    """Of one ``everstep run``. ``node``: how the others call this one; None: there are none. Used from the loop's thread only."""

    def __init__(self, console: Console, source: Source | None = None, node: str | None = None) -> None:
        self._console, self._source, self.node = console, source, node
        self._ear: Ear | None = None
        self._began = clock.now()
        self._watch: asyncio.Task[None] | None = None
        #: the first signal, if there was one
        self.signal: Notice | None = None
        #: the notices that stand, as this run takes them
        self.standing: tuple[notices.Notice, ...] = ()
        self.changed: Callable[[], None] = lambda: None

    def listen(self) -> None:
        """Hear signals (they are blocked so far) and notices from now on."""
        loop = asyncio.get_running_loop()
        for signum in SIGNALS:
            if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                loop.add_signal_handler(signum, self._on_signal, signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self._source is not None and self._watch is None:
            self._watch = loop.create_task(self._source.watch(self.on_standing, self._console.say))
            self._watch.add_done_callback(self._watched)

    def attend(self, ear: Ear | None) -> None:
        """Have ``ear`` answer, what was heard before included; None: nobody does here, the leader is told."""
        self._ear = ear
        if ear is not None and self.signal is not None:
            ear.on_signal(signal.Signals[self.signal.source])
        if ear is not None and self.standing:
            ear.on_notices(self.standing)

    @property
    def must_leave(self) -> Notice | None:
        """Why this node has to leave now; None: it need not."""
        if self.signal is not None:
            return self.signal
        urgent = notices.urgent(self.standing)
        if urgent is None:
            return None
        return Notice(cause=StopCause.PREEMPTION, source=urgent.source, deadline=urgent.deadline)

    async def acknowledge(self) -> None:
        """All is saved and everybody has left: tell the source that nothing needs the machine any more."""
        if self._source is None:
            return
        for notice in self.standing:
            if notice.effect is Effect.WARN:
                continue
            try:
                async with asyncio.timeout(ACKNOWLEDGE):
                    said = await self._source.acknowledge(notice)
            except TimeoutError:
                said = f"{self._source.name} did not take the acknowledgement in time"
            if said:
                self._console.say(said)

    # ------------------------------------------------------------------ what is heard

    def _on_signal(self, signum: signal.Signals) -> None:
        first = self.signal is None
        if first:
            cause = StopCause.USER if signum is signal.SIGINT else StopCause.PREEMPTION
            self.signal = Notice(cause=cause, source=signum.name)
        if self._ear is not None:
            self._ear.on_signal(signum)
        elif first:
            self._console.say(f"{signum.name}: the leader is told")
        elif signum is signal.SIGINT:
            self._console.say("leaving at once")
            os._exit(130)
        self.changed()

    def on_standing(self, standing: tuple[notices.Notice, ...]) -> None:
        """The source says that these stand now."""
        standing = tuple(notices.as_of(notice, self._began) for notice in standing)
        change = notices.compare(self.standing, standing)
        if not change.news and not change.withdrawn:
            return
        self.standing = standing
        if self._ear is not None:
            self._ear.on_notices(standing)
        else:
            for notice in change.news:
                self._console.say(f"{notice.source}: the leader is told")
            for notice in change.withdrawn:
                self._console.say(f"{notice.source}: over, or withdrawn; the leader is told")
        self.changed()

    def _watched(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            # a bug of ours must not end the training; but notices may not be seen any more
            self._console.say(f"unexpected {type(error).__name__} in what watches for notices: {error}")
