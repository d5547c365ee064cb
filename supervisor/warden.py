"""Hears what asks a node that follows to leave; the leader is told, and decides."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from supervisor.edge.console import Console
from supervisor.fleet import Notice
from supervisor.model import StopCause
from supervisor.stopping import SIGNALS


class Warden:
    """Hears what asks this node to leave, while it follows: signals, and its own machine's notices."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.notice: Notice | None = None
        self.changed: Callable[[], None] = lambda: None

    def listen(self) -> None:
        """Hear signals (they are blocked so far)."""
        loop = asyncio.get_running_loop()
        for signum in SIGNALS:
            if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                loop.add_signal_handler(signum, self._on_signal, signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _on_signal(self, signum: signal.Signals) -> None:
        if self.notice is None:
            cause = StopCause.USER if signum is signal.SIGINT else StopCause.PREEMPTION
            self.notice = Notice(cause=cause, source=signum.name)
            self._console.say(f"{signum.name}: the leader is told")
        elif signum is signal.SIGINT:
            self._console.say("leaving at once")
            os._exit(130)
        self.changed()
