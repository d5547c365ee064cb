"""SLURM as the supervisor's engine: when the job must be over, and running it again as the last act.

Where there is no ``scontrol`` (in a container), what the environment says of the time limit has to do, and the batch script
requeues the job: it sees exit code 75 (``launch/slurm/script``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from launch.slurm import environment, hostlist, shown
from launch.slurm.client import Client
from launch.slurm.environment import Allocation
from supervisor.config import Options
from supervisor.decide.deadline import Deadline
from supervisor.decide.restart import EXIT_AGAIN
from supervisor.edge import clock
from supervisor.edge.threads import in_thread
from supervisor.engine import Alone, Engine
from supervisor.errors import ConfigError

PERIOD: Final = (
    120.0  # seconds between two looks: limits change seldom, and thousands of jobs have one controller
)
KILL_WAIT: Final = 30.0  # seconds from SIGTERM to SIGKILL, unless the cluster says otherwise
_REQUEUES: Final = 3  # attempts


class Asked(Protocol):
    """Whom to ask: ``Client``."""

    def show(self, *what: str) -> str | None:
        """The answer of ``scontrol show``, or None."""
        ...

    def requeue(self, job: int) -> str | None:
        """None when SLURM took it, else why not."""
        ...

    def exclude(self, job: int, nodes: Sequence[str]) -> str | None:
        """Likewise."""
        ...


@dataclass
class Slurm:
    """An ``Engine``. ``client`` None: there is nobody to ask."""

    allocation: Allocation
    client: Asked | None
    requeues: bool = True
    now: Callable[[], float] = clock.now

    def __post_init__(self) -> None:
        self._kill_wait: float | None = None
        self._answered = False

    @property
    def name(self) -> str:
        """What it puts into the runtime directory: an epilog finds the job's by it."""
        return f"slurm {self.allocation.job_id}"

    @property
    def period(self) -> float:
        """Seconds between two looks at the deadline."""
        return PERIOD

    async def deadline(self) -> Deadline | None:
        """When SLURM ends the job, as it says now."""
        return await in_thread(self._deadline)

    def _deadline(self) -> Deadline | None:
        job = self._job()
        if job is None:
            end = self.allocation.end_time
            if end is None or self._answered:  # what was told later holds
                return None
            return Deadline(source="SLURM's time limit", end=end, kill=end + KILL_WAIT)
        self._answered = True
        now, kill_wait = self.now(), self._wait_before_kill()
        if job.restarts > self.allocation.restarts or job.state == "COMPLETING":
            return Deadline(source="the end of the SLURM job", end=now, kill=now + kill_wait)
        if job.end_time is None:
            return None
        source = "SLURM's time limit" if job.preempt_time is None else "a preemption by SLURM"
        return Deadline(source=source, end=job.end_time, kill=job.end_time + kill_wait)

    def leave(self, code: int, bad: Collection[str] = ()) -> str | None:
        """Requeue the job if its state is saved and nobody else does so, on other nodes than ``bad``; what came of it."""
        said = self._requeue(code)
        if code != EXIT_AGAIN or not bad or not self.requeues:
            return said
        try:
            without = self._exclude(bad)
        except (
            ConfigError
        ) as error:  # lists that are written in another way than we know: the job is requeued all the same
            without = str(error)
        return f"{said}; {without}" if said and without else said or without

    def _exclude(self, bad: Collection[str]) -> str | None:
        """Add them to the job's ExcNodeList: SLURM takes that of a job that is pending, so once it is requeued, and not before."""
        text = self.client.show("job", str(self.allocation.job_id)) if self.client else None
        job = shown.parse_job(text) if text else None
        if self.client is None or text is None or job is None or job.restarts <= self.allocation.restarts:
            return None
        found = shown.fields(text)
        before, asked_for = (_hosts(found.get(name)) for name in ("ExcNodeList", "ReqNodeList"))
        more = [
            name
            for name in self.allocation.nodes
            if name in bad and name not in before and name not in asked_for
        ]
        if not more:
            return None
        names, left = ", ".join(more), self._others(found, len(before) + len(more))
        if not left:
            return f"it may get {names} again: the partition has too few other nodes"
        refusal = self.client.exclude(self.allocation.job_id, [*before, *more])
        return f"without {names}" if refusal is None else f"it may get {names} again ({refusal})"

    def _others(self, job: Mapping[str, str], excluded: int) -> bool:
        """Whether the job's partition has nodes enough beside so many."""
        assert self.client is not None
        partition = shown.fields(self.client.show("partition", job.get("Partition", "").split(",")[0]) or "")
        total, needed = partition.get("TotalNodes", ""), job.get("NumNodes", "").split("-")[0]
        return total.isdecimal() and needed.isdecimal() and int(total) - excluded >= int(needed)

    def _requeue(self, code: int) -> str | None:
        if code != EXIT_AGAIN or not self.requeues:
            return None
        if self.client is None:
            return "there is no scontrol here: the batch script has to requeue the job (exit code 75)"
        done, problem = f"SLURM job {self.allocation.label} requeued", "scontrol did not answer"
        asked = False
        for _ in range(_REQUEUES):
            job = self._job()
            if job is None:
                continue
            again = shown.again(job, self.allocation.restarts)
            if not again.ask:  # that may be our doing, though the answer was lost
                return done if asked and job.restarts > self.allocation.restarts else again.why
            refusal, asked = self.client.requeue(self.allocation.requeue_id), True
            if refusal is None:
                return done
            problem = refusal
        job = self._job()
        if job is not None and job.restarts > self.allocation.restarts:
            return done
        return f"SLURM job {self.allocation.label} could not be requeued ({problem}): submit it again"

    def _job(self) -> shown.ShownJob | None:
        text = self.client.show("job", str(self.allocation.job_id)) if self.client else None
        return None if text is None else shown.parse_job(text)

    def _wait_before_kill(self) -> float:
        if self._kill_wait is None and self.client is not None:
            text = self.client.show("config")
            seconds = None if text is None else shown.seconds(shown.parse_config(text), "KillWait")
            self._kill_wait = KILL_WAIT if seconds is None else seconds
        return KILL_WAIT if self._kill_wait is None else self._kill_wait


def _hosts(listed: str | None) -> tuple[str, ...]:
    return () if listed in (None, "(null)") else hostlist.expand(listed)


def engine(options: Options, environ: Mapping[str, str], say: Callable[[str], None]) -> Engine:
    """Whoever may end this run: SLURM within one of its jobs, else nobody.

    Raises UsageError where everstep was started in a way that cannot go well.
    """
    allocation = environment.parse(environ)
    if allocation is None:
        return Alone()
    warning = environment.check(allocation)
    if warning is not None:
        say(warning)
    return Slurm(allocation, Client.found(), requeues=options.requeue == "auto")


def suffix(environ: Mapping[str, str]) -> str:
    """``-4711`` in SLURM job 4711, ``-4711_3`` in task 3 of its array: the same when it is requeued, and no other job's."""
    allocation = environment.parse(environ)
    return "" if allocation is None else f"-{allocation.label}"
