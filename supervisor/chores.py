"""What need not be done before the next attempt begins, and what goes on beside everything else."""

from __future__ import annotations

import asyncio
from pathlib import Path

from supervisor import background
from supervisor import evidence as evidences
from supervisor.edge.console import Console
from supervisor.model import AttemptEvidence, Failure


class Chores:
    """Of one supervisor. Used from the loop's thread only."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._waiting: list[tuple[Path, Failure, AttemptEvidence, str]] = []

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
        background.start(self.catch_up())
