"""Starting a run, and an attempt: the program's command line and environment, and a port that is its own."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from supervisor.about import version
from supervisor.attempt import Attempt
from supervisor.config import Options
from supervisor.edge import clock
from supervisor.edge.forensics import FLIGHT_RECORDS
from supervisor.edge.link import ATTEMPT, RUNTIME, STANDBY
from supervisor.edge.ports import ReservedPort
from supervisor.errors import UsageError
from supervisor.model import AttemptEnded, AttemptEvidence, Failure, RunStarted
from supervisor.program import Program, Rendezvous
from supervisor.settings import described

#: what turns torch's flight recorder on: the number of records that it keeps
FLIGHT_RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


def run_started(options: Options, program: Program, epoch: int) -> RunStarted:
    """The fact that this process takes charge of the job, now."""
    return RunStarted(
        time=clock.now(),
        epoch=epoch,
        host=socket.gethostname(),
        pid=os.getpid(),
        command=program.command,
        version=version(),
        max_failures=options.max_failures,
        max_preemptions=options.max_preemptions,
        guard=options.guard,
        guard_times=options.guard_times,
        guard_back=options.guard_back,
        guard_skip=options.guard_skip,
        settings=described(options),
    )


def attempt_ended(
    attempt: Attempt,
    evidence: AttemptEvidence,
    failure: Failure | None,
    *,
    stopped: bool,
    reshaped: bool,
    noticed: float | None,
    metrics: dict[str, float],
) -> AttemptEnded:
    """The fact that it is over. ``reshaped``: it was stopped to go on with other nodes."""
    return AttemptEnded(
        time=clock.now(),
        attempt=attempt.number,
        step=evidence.step,
        total_steps=attempt.total_steps,
        stopped=stopped,
        finished=failure is None and not stopped and not reshaped,
        failure=failure if not stopped else None,  # a failure while stopping is charged to nobody
        noticed=None if failure is None or stopped else noticed,
        metrics=metrics,
    )


@dataclass(frozen=True)
class Launcher:
    """Launches the attempts of one job."""

    program: Program
    folder: Path
    run_id: str
    runtime: Path

    def launch(self, attempt: Attempt, meeting: Rendezvous | None = None) -> ReservedPort | None:
        """Start it, on this node alone, or as its part of an attempt that meets there.

        Returns the port that is to be released when the attempt is over; None: it is not ours. Raises UsageError when it cannot be
        started, StorageError when there is no room for its logs.
        """
        attempt.prepare()
        port = ReservedPort() if meeting is None else None
        meeting = meeting or Rendezvous(port=port.number if port else 0)
        try:
            argv = self.program.attempt_argv(meeting)
            attempt.launch(argv, self._environment(attempt))
        except OSError as error:
            if port is not None:
                port.release()
            raise UsageError(f"cannot start {argv[0]}: {error.strerror}") from None
        return port

    def _environment(self, attempt: Attempt) -> dict[str, str]:
        environment = dict(os.environ)
        environment.pop("EVERSTEP_KEY", None)  # the supervisor verifies; a worker has no use for the secret
        environment.pop(STANDBY, None)
        if attempt.standby:
            environment[STANDBY] = str(attempt.standby)
        records = any(environment.get(name, "0") != "0" for name in FLIGHT_RECORDER)
        if records and not any(environment.get(name) for name in FLIGHT_RECORDS):
            (attempt.folder / "flight").mkdir(exist_ok=True)
            environment[FLIGHT_RECORDS[0]] = str(attempt.folder / "flight" / "rank_")
        return {
            **environment,
            "EVERSTEP_DIR": str(self.folder),
            "EVERSTEP_RUN_ID": self.run_id,
            ATTEMPT: str(attempt.number),
            RUNTIME: str(self.runtime),
            **self.program.environment,
        }
