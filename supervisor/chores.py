"""What need not be done before the next attempt begins, and what goes on beside everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path

from supervisor import evidence as evidences
from supervisor.edge.console import Console
from supervisor.model import AttemptEvidence, Failure


class Chores:
    """Of one supervisor. Used from the loop's thread only."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._waiting: list[tuple[Path, Failure, AttemptEvidence, str]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def write_evidence(
        self, folder: Path, failure: Failure, evidence: AttemptEvidence, name: str = "failure.json"
    ) -> None:
        """Into the attempt's folder, when there is time."""
        self._waiting.append((folder, failure, evidence, name))

    async def catch_up(self) -> None:
        """Do what waits, now."""
        while self._waiting:
            folder, failure, evidence, name = self._waiting.pop(0)
            if problem := await asyncio.to_thread(evidences.write, folder, failure, evidence, name):
                self._console.say(problem)

    def catch_up_soon(self) -> None:
        """Beside the attempt that has begun."""
        self.background(self.catch_up())

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Have it done beside all else."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself would forget it
        task.add_done_callback(self._tasks.discard)
