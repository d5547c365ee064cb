"""Tells the world outside how the job stands: metrics and traces for whoever collects them, events for hooks.

It listens to the ledger, so nothing is told that is not in the journal; and nothing that it does can hold up or end the run:
what cannot be used at all is refused before the first attempt, what fails later is said in one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor.config import Options
from supervisor.decide import telling
from supervisor.edge import arenas, clock
from supervisor.edge.hooks import Runner
from supervisor.edge.jobdir import JobDirectory, JobFile
from supervisor.edge.live import read_live
from supervisor.edge.threads import in_thread
from supervisor.errors import ConfigError
from supervisor.ledger import Ledger
from supervisor.live_view import LiveView
from supervisor.model import Decided, Fact

if TYPE_CHECKING:
    from supervisor.status import Status
    from supervisor.tracing import Tracing

LOG = "hooks.log"  # in the job directory


class Herald:
    """Used by the node from the loop's thread. Raises ConfigError for what cannot be exposed where it was asked."""

    def __init__(
        self,
        options: Options,
        job: JobDirectory,
        file: JobFile,
        ledger: Ledger,
        say: Callable[[str], None],
        view: LiveView,
    ) -> None:
        self._view = view
        self._options, self._job, self._file, self._ledger, self._say = options, job, file, ledger, say
        for hook in options.hook:
            if hook.url is None and shutil.which(hook.argv[0]) is None:
                raise ConfigError(f"--hook {hook}: no command {hook.argv[0]!r} that can be run")
        self._hooks = [
            (
                hook,
                Runner(
                    str(hook),
                    hook.argv,
                    hook.url,
                    timeout=options.hook_timeout,
                    log=job.path / LOG,
                    report=say,
                ),
            )
            for hook in options.hook
        ]
        self._closers: list[Callable[[], None]] = []
        self._expose()
        self._tracing = self._trace() if options.otel else None
        if self._hooks:
            ledger.listen(self._heard)

    async def close(self, patience: float | None = None) -> None:
        """Let the hooks be told what is left, within ``patience`` seconds (default: --hook-timeout), and expose no more."""
        deadline = clock.monotonic() + (self._options.hook_timeout if patience is None else patience)
        for _, runner in self._hooks:
            await runner.finish(max(0.0, deadline - clock.monotonic()))
        for close in self._closers:
            close()
        if self._tracing is not None:
            with contextlib.suppress(TimeoutError):
                left = max(0.0, deadline - clock.monotonic())
                await asyncio.wait_for(in_thread(self._tracing.close), left)

    def _heard(self, fact: Fact) -> None:
        if not isinstance(fact, Decided):
            return
        record = self._ledger.record
        about = {
            "name": self._job.path.name,
            "dir": str(self._job.path),
            "run_id": self._file.run_id,
            "host": socket.gethostname(),
        }
        for event in telling.events(record, fact):
            message = telling.message(event, record, fact, about)
            for hook, runner in self._hooks:
                if event in hook.events:
                    runner.tell(message)

    def _trace(self) -> Tracing:
        from supervisor.tracing import Tracing, otlp

        about = {
            "everstep.name": self._job.path.name,
            "everstep.run_id": self._file.run_id,
            "host.name": socket.gethostname(),
        }
        tracing = Tracing(otlp(), about, self._say)
        self._ledger.listen(tracing.hear)
        return tracing

    # ------------------------------------------------------------------ metrics

    def _expose(self) -> None:
        options = self._options
        if options.metrics_port is None and options.metrics_file is None:
            return
        from supervisor import metrics
        from supervisor.edge.exposing import Endpoint, TextFile

        metrics.check()

        def render() -> bytes:
            return metrics.text(self._status(), sum(runner.failures for _, runner in self._hooks))

        if options.metrics_port is not None:
            endpoint = Endpoint(options.metrics_address, options.metrics_port, render, metrics.CONTENT_TYPE)
            self._closers.append(endpoint.close)
            self._say(f"metrics at http://{options.metrics_address}:{endpoint.server_port}/metrics")
        if options.metrics_file is not None:
            file = TextFile(options.metrics_file.absolute(), render, self._say)
            self._closers.append(file.close)

    def _status(self) -> Status:
        """As ``everstep status`` has it. Called from the threads of whoever asks."""
        from supervisor.status import describe, of_all_ranks

        record, runtime = self._ledger.record, Path(self._file.runtime)
        live = read_live(runtime, record.attempt or 0) if record.attempt_first_time is not None else None
        if live is not None:
            newest = self._view.newest
            told = newest[1] if newest is not None and newest[0] == record.attempt else None
            live = of_all_ranks(live, told, record)
        return describe(
            self._job.path,
            record,
            clock.now(),
            alive=True,
            live=live,
            arenas=arenas.measure(runtime, record.pid) if live else None,
            run_id=self._file.run_id,
        )
