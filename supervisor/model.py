"""The vocabulary: what every other module speaks in. Standard library only, nothing mutable. How things
fail is in ``supervisor/failing.py``.

A *step* count is always the number of completed optimizer steps, which is also the index of the next step to run: a
checkpoint at step 1200 holds the state after steps 0 … 1199. Times named ``time`` are Unix seconds (they go into the
journal); those named ``monotonic`` come from ``time.monotonic()`` and order the events of one node.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from supervisor.failing import (
    AttemptEvidence,
    Failure,
    FailureKind,
    Hang,
    HangKind,
    HungRank,
    Raised,
    RankEnd,
    Trouble,
    TroubleKind,
)

__all__ = [
    "AttemptEvidence", "Failure", "FailureKind", "Hang", "HangKind", "HungRank", "Raised", "RankEnd", "Trouble", "TroubleKind",
]  # fmt: skip


class State(enum.StrEnum):
    """Where a job stands; the transitions are in ``decide/lifecycle.py``."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    COMPLETED = "completed"
    PREEMPTED = "preempted"
    FAILED = "failed"


class Action(enum.StrEnum):
    """What to do after an attempt has ended."""

    RESTART = "restart"
    ROLL_BACK = "roll_back"  # restart from a state before the numbers went wrong
    COMPLETE = "complete"
    STOP = "stop"
    GIVE_UP = "give_up"

    @property
    def goes_on(self) -> bool:
        """Whether another attempt follows."""
        return self in (Action.RESTART, Action.ROLL_BACK)


class StopCause(enum.StrEnum):
    """Who asked the job to stop."""

    PREEMPTION = "preemption"
    USER = "user"


class Effect(enum.StrEnum):
    """What a notice asks for; the theory is in ``decide/notices.py``."""

    WARN = "warn"  # save now, and go on
    LEAVE = "leave"  # save now, and stop in time for the deadline
    STOP = "stop"  # stop now


class Scope(enum.StrEnum):
    """What is taken away."""

    NODE = "node"
    JOB = "job"


class WarningKind(enum.StrEnum):
    """What an early warning is about; the rules are in ``decide/warning.py``."""

    NAN = "nan"
    SPIKE = "spike"
    PLATEAU = "plateau"
    GRADIENTS = "gradients"
    SLOWER = "slower"


class ProposalState(enum.IntEnum):
    """The verdict on the current save proposal; the theory is in ``decide/savepoint.py``."""

    NONE = 0
    PROPOSED = 1
    COMMITTED = 2
    ABORTED = 3


class ProposalFlag(enum.IntFlag):
    """What the agreed save is for."""

    CHECKPOINT = 1  # make the snapshot durable too
    STOP = 2  # leave the loop after it


class Tier(enum.StrEnum):
    """Where a consistent state lies, nearest first."""

    RAM = "ram"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Steps that are left out, and their data with them: from ``first`` up to, not including, ``stop``."""

    first: int
    stop: int
    batches: dict[str, int] = field(default_factory=dict)  # that a step takes of each data loader; else one


@dataclass(frozen=True, kw_only=True)
class Condemned:
    """States that are no good: of ``attempt`` and all before it, after ``step`` and more steps."""

    attempt: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do now, and why, in plain words."""

    action: Action
    reason: str
    delay: float = 0.0  # seconds to wait before a restart
    rollback: int = 0  # of a ROLL_BACK: the how manieth without getting past the trouble
    skip: Skip | None = None  # … and what is left out from now on
    level: int | None = None  # … or the step in which the loss comes to a new level, which is accepted


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The budgets of a job."""

    max_failures: int = 5
    max_preemptions: int = 100
    guard: str = "off"  # these: decide/guard.py
    guard_times: int = 3
    guard_back: int = 1
    guard_skip: int = 0


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of the journal. ``time`` is Unix seconds."""

    time: float


@dataclass(frozen=True, kw_only=True)
class RunStarted(Fact):
    """A supervisor took charge of the job. ``epoch`` grows by one each time."""

    epoch: int
    host: str
    pid: int
    command: tuple[str, ...]
    version: str
    max_failures: int
    max_preemptions: int
    guard: str = "off"
    guard_times: int = 3
    guard_back: int = 1
    guard_skip: int = 0
    settings: dict[str, str] = field(default_factory=dict)  # its options, in words (supervisor/settings.py)


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(Fact):
    """Workers are being launched, or (``standby``) were launched ahead and are let begin."""

    attempt: int
    standby: bool = False


@dataclass(frozen=True, kw_only=True)
class StandbyReady(Fact):
    """The workers of the next attempt have imported and wait. ``seconds``: since their launch."""

    attempt: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Resumed(Fact):
    """All ranks of the attempt were told where to resume; ``path`` None: from scratch."""

    attempt: int
    step: int
    tier: Tier | None = None
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class WorkersReady(Fact):
    """Every rank of the attempt has registered."""

    attempt: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class FirstStep(Fact):
    """The attempt completed its first step on every rank; ``step`` counts completed steps."""

    attempt: int
    step: int
    total_steps: int | None = None
    restore_seconds: float = 0.0  # of the rank that took longest to read its state back


@dataclass(frozen=True, kw_only=True)
class Progress(Fact):
    """A sign of life now and then (seconds apart): ``step`` steps are complete on every rank, since ``stepped`` (None: just now)."""

    attempt: int
    step: int
    total_steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    stepped: float | None = None  # Unix seconds


@dataclass(frozen=True, kw_only=True)
class SnapshotCompleted(Fact):
    """Every rank holds ``step`` in host RAM. ``seconds``: the longest stall of any rank."""

    attempt: int
    step: int
    seconds: float
    bytes: int
    stalled: float | None = None  # … and of those before it that were not journaled; None: ``seconds``


@dataclass(frozen=True, kw_only=True)
class CheckpointCommitted(Fact):
    """``step`` is durable, with its manifest. ``seconds``: from the start of the drain to the commit."""

    attempt: int
    step: int
    path: str
    seconds: float
    bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    emergency: bool = False  # in the job directory, because the place for checkpoints did not take it in time


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Fact):
    """A drain did not reach its commit; nothing older was touched."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointRejected(Fact):
    """A stored state was found damaged and skipped."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointsPruned(Fact):
    """Retention removed these steps."""

    steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DeadlineSet(Fact):
    """The job is ended at ``deadline`` (Unix seconds), says ``source``; the newest one holds."""

    source: str
    deadline: float


@dataclass(frozen=True, kw_only=True)
class NoticeReceived(Fact):
    """Whoever gives the job its machine has said that it may be taken away. ``deadline``: Unix seconds."""

    source: str
    key: str
    effect: Effect
    deadline: float | None = None
    scope: Scope = Scope.NODE
    revocable: bool = False
    node: str | None = None  # of several


@dataclass(frozen=True, kw_only=True)
class NoticeWithdrawn(Fact):
    """The notice of that ``key`` does not hold any more; ``too_late``: the stop that it asked for is carried out all the same."""

    source: str
    key: str
    too_late: bool = False


@dataclass(frozen=True, kw_only=True)
class StopWithdrawn(Fact):
    """The stop that was requested will not be carried out: the job goes on. ``source``: who had asked for it."""

    source: str


@dataclass(frozen=True, kw_only=True)
class StatesCondemned(Fact):
    """No state of ``attempt`` or one before it that is ``step`` or more steps old is to be used again."""

    attempt: int
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class WarningRaised(Fact):
    """Something looks as if it could go wrong (decide/warning.py). Nothing follows from it."""

    attempt: int
    kind: WarningKind
    step: int
    text: str
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class WarningCleared(Fact):
    """It does not look so any more."""

    kind: WarningKind
    step: int
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class StopRequested(Fact):
    """The job must stop soon. ``source`` is the signal's or notice's name."""

    cause: StopCause
    source: str
    deadline: float | None = None  # Unix seconds at which the job is ended, where that is known


@dataclass(frozen=True, kw_only=True)
class AttemptEnded(Fact):
    """No process of the attempt is left. ``failure`` None: every rank finished, or a stop was carried out."""

    attempt: int
    step: int | None  # completed steps of the furthest rank
    total_steps: int | None = None
    stopped: bool = False  # it ended because of a StopRequested
    finished: bool = False  # every rank exited with code 0 by itself
    failure: Failure | None = None
    noticed: float | None = None  # when its end was (Unix seconds)
    metrics: dict[str, float] = field(default_factory=dict)  # its last ones, once it has made a step


@dataclass(frozen=True, kw_only=True)
class Decided(Fact):
    """The verdict on the attempt that ended."""

    attempt: int
    action: Action
    reason: str
    delay: float = 0.0
    rollback: int = 0
    skip: Skip | None = None
    level: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunEnded(Fact):
    """The supervisor leaves with ``exit_code``."""

    exit_code: int
    reason: str


#: every fact by the name it bears in the journal
FACTS: dict[str, type[Fact]] = {cls.__name__: cls for cls in Fact.__subclasses__()}
