"""Taking charge of a job: its journal is read, and from then on written, by the one who holds the job's lock."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from supervisor.bringing import bring, is_left_behind
from supervisor.config import Options
from supervisor.edge import jobdir, journal, runtimes, sweeping
from supervisor.edge.console import Console
from supervisor.ledger import Ledger
from supervisor.model import State
from supervisor.program import Program
from supervisor.replay import Replay


class Charge:
    """A job whose lock the caller holds. ``node``: this one's name among several. Raises JobError when it is another training's."""

    def __init__(
        self,
        options: Options,
        program: Program,
        job: jobdir.JobDirectory,
        console: Console,
        node: str | None = None,
    ) -> None:
        self._options, self._program, self._job, self._console = options, program, job, console
        self._node = node
        self._folded = Replay(job.journal)
        self._folded.advance()
        for problem in self._folded.problems:
            console.say(f"journal: {problem}")
        job.check(program.identity)

    @property
    def finished(self) -> str | None:
        """That the job is finished, in words; None: there is something to run."""
        record = self._folded.record
        if record.state is not State.COMPLETED or self._options.continue_:
            return None
        return f"{self._job.path} is finished (step {record.step}); --continue runs it on"

    async def bring_home(self) -> None:
        """Where the last checkpoint is an emergency copy, store it where it belongs."""
        if is_left_behind(self._options, self._job, self._folded.record):
            with self._taken() as (file, ledger):
                await bring(self._options, self._job, file, ledger, self._console)

    @contextlib.contextmanager
    def taken(self, engine: str) -> Iterator[tuple[jobdir.JobFile, Ledger]]:
        """Be the job's supervisor, with a runtime directory."""
        before = self._folded.record.command
        if before and before != self._program.command:
            self._console.say(f"the command line has changed; it was: {' '.join(before)}")
        with self._taken() as (file, ledger):
            runtime = Path(file.runtime)
            with runtimes.lay_out(runtime, self._job.path, file.epoch, engine):
                sweeping.sweep(runtime)
                yield file, ledger

    @contextlib.contextmanager
    def _taken(self) -> Iterator[tuple[jobdir.JobFile, Ledger]]:
        """… whose epoch is higher than that of any other, and who writes to its journal."""
        file = self._job.open_epoch(self._program.identity, list(self._program.command), self._node)
        name = self._node or socket.gethostname()
        written = journal.Journal(self._job.journal / f"{name}.jsonl", self._console.say)
        self._folded.advance()  # a torn last line has its newline now
        ledger = Ledger(written, self._folded)
        try:
            yield file, ledger
        finally:
            ledger.close()
