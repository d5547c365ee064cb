"""Runs hooks beside the job: each is told one thing at a time, in order, within a time limit, and may fail as it likes.

A hook is a process in a session of its own. Its standard input is a file in memory, so nobody waits for it to read; its output
goes to a log. Nothing that it does or leaves undone reaches the training: what is said of it is one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from supervisor.edge import kernel, processes

MOST_WAITING: Final = 32  # messages for one hook; then the oldest goes
POST: Final = Path(__file__).with_name("post.py")  # imported by nobody: it needs what no supervisor does
LEAST_LEFT: Final = 1.0  # seconds for a hook to be ended and collected


class Runner:
    """One hook. Used from the loop's thread only.

    ``argv`` is started as it is (no shell); without one, the message is posted to ``url``. ``name`` is what it is called.
    """

    def __init__(
        self,
        name: str,
        argv: tuple[str, ...],
        url: str | None,
        *,
        timeout: float,
        log: Path,
        report: Callable[[str], None],
    ) -> None:
        self._name, self._timeout, self._log, self._report = name, timeout, log, report
        self._argv = argv if url is None else (sys.executable, "-I", str(POST))
        self._extra = {} if url is None else {"EVERSTEP_HOOK_URL": url}
        self._waiting: deque[Mapping[str, Any]] = deque(maxlen=MOST_WAITING)
        self._task: asyncio.Task[None] | None = None
        self.failures = 0

    def tell(self, message: Mapping[str, Any]) -> None:
        """Have the hook told, when it has been told what came before."""
        self._waiting.append(message)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def finish(self, patience: float) -> None:
        """Wait until it was told everything, for ``patience`` seconds; then end it, and say so."""
        if self._task is None or self._task.done():
            return
        done, _ = await asyncio.wait({self._task}, timeout=patience)
        if not done:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=LEAST_LEFT)
            self._failed(f"was ended, the run does not wait for it ({1 + len(self._waiting)} not told)")

    async def _work(self) -> None:
        while self._waiting:
            message = self._waiting.popleft()
            try:
                how = await self._run(message)
            except OSError as error:
                self._failed(f"cannot be started: {error.strerror or error}")
                continue
            if how is None:
                self._failed(f"took longer than {self._timeout:g} s (--hook-timeout) and was ended")
            elif how.signal is not None or how.code:
                end = f"signal {how.signal}" if how.signal is not None else f"exit code {how.code}"
                self._failed(f"failed with {end}, see {self._log}")

    async def _run(self, message: Mapping[str, Any]) -> processes.Exit | None:
        """Run it once; how it ended, None if it had to be ended."""
        environment = {**os.environ, **self._extra, "EVERSTEP_EVENT": str(message["event"])}
        content = kernel.memfd("everstep-event")
        try:
            os.write(content, json.dumps(message).encode() + b"\n")
            os.lseek(content, 0, os.SEEK_SET)
            pid = processes.spawn(self._argv, environment, self._log, stdin=content)
        finally:
            os.close(content)
        processes.expect(pid)
        pidfd = processes.open_pidfd(pid)
        if pidfd is None:
            return processes.end_of(pid)
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        try:
            await asyncio.wait_for(ended.wait(), self._timeout)
        except TimeoutError:
            return None
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            if not ended.is_set():  # it bears its number still, and its group with it
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                processes.forget(pid)
        return processes.end_of(pid)

    def _failed(self, what: str) -> None:
        self.failures += 1
        self._report(f"hook {self._name} {what}; the run goes on")
