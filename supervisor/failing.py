"""The vocabulary of failing: how a rank ends or hangs, what is known of it, and what is concluded.

Part of ``supervisor/model.py``, which hands all of it on: standard library only, nothing mutable.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field


class FailureKind(enum.StrEnum):
    """What went wrong in an attempt, from its root cause."""

    CRASH = "crash"  # a worker died of a signal
    HOST_OOM = "host_oom"  # the kernel killed it for memory
    CUDA_OOM = "cuda_oom"
    DEVICE = "device"
    COMMUNICATION = "communication"
    NUMERIC = "numeric"
    STORAGE = "storage"
    EXCEPTION = "exception"  # the user's code raised
    STARTUP = "startup"  # it never reached its first step
    EARLY_EXIT = "early_exit"  # a rank left with code 0 while the others went on
    STATE_MISMATCH = "state_mismatch"  # the checkpoint does not fit the training
    LAUNCHER = "launcher"  # torchrun itself died
    HANG = "hang"
    NODE_LOST = "node_lost"


@dataclass(frozen=True, kw_only=True)
class Raised:
    """An exception that ended a worker. ``type`` is the qualified name, e.g. ``torch.OutOfMemoryError``."""

    type: str
    message: str
    traceback: str
    #: names of the classes it derives from, most derived first, e.g. ("ModuleNotFoundError", "ImportError", …)
    bases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended, as far as it is known."""

    rank: int
    pid: int
    monotonic: float  # when its end (or, if earlier, its exception) was noticed
    exit_code: int | None = None
    signal: int | None = None
    told_exit_code: int | None = None  # what it said it would exit with; it may have died of a signal instead
    raised: Raised | None = None
    step: int | None = None  # completed steps; None before the first report
    closed: bool = False  # its Session left the loop in order
    completed: bool | None = None  # … and after the last step; None: it did not say
    oom_killed: bool = False
    last_lines: tuple[str, ...] = ()


class HangKind(enum.StrEnum):
    """What keeps the suspect of a hang from going on."""

    MAIN_THREAD = "main_thread"  # the interpreter runs, its main thread does not move
    GIL = "gil"  # no thread of the interpreter runs, though the process does
    STOPPED = "stopped"  # the process was stopped (SIGSTOP)
    SILENT = "silent"  # no output; nothing more is known


@dataclass(frozen=True, kw_only=True)
class HungRank:
    """One rank of an attempt that hangs. Times in seconds, without those for which the whole node was paused."""

    rank: int
    step: int
    stage: str  # what it was doing (decide/health.py)
    quiet: float  # since its last sign of life
    beat_quiet: float | None = None  # since its background thread's last beat; None: it has none
    state: str = ""  # the letter of /proc/<pid>/stat
    where: str | None = None  # the place in the program, where its stack could be had
    waiting: bool = False  # it waits there for other ranks
    suspect: bool = False  # the others may be waiting for it


@dataclass(frozen=True, kw_only=True)
class Hang:
    """An attempt that does not go on, though no process of it has ended."""

    kind: HangKind
    monotonic: float
    limit: float  # seconds without a sign of life that were allowed
    ranks: tuple[HungRank, ...] = ()


class TroubleKind(enum.StrEnum):
    """What is wrong with the numbers of a training (decide/guard.py)."""

    NAN = "nan"  # not a number, or infinite
    SPIKE = "spike"  # a loss far above what it was


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Numbers of a training that have gone wrong, as the guard of one rank saw it."""

    kind: TroubleKind
    metric: str
    rank: int
    step: int  # the first one whose number is wrong
    value: float
    usual: float | None = None  # the mean before a spike
    limit: float | None = None  # … and what is one
    good: int | None = None  # the last step before it whose number was in order; None: this attempt saw none
    monotonic: float = 0.0  # when the supervisor heard of it
    batches: dict[str, int] = field(default_factory=dict)  # that a step takes of each data loader


@dataclass(frozen=True, kw_only=True)
class AttemptEvidence:
    """All that is known of an attempt that has ended: the input of ``decide/classify.py``."""

    attempt: int
    world_size: int | None  # ranks on this node; None when no worker ever registered
    step: int | None  # completed steps of the furthest rank; None when no step was completed
    ends: tuple[RankEnd, ...]  # only the ranks that ended by themselves, not those we killed
    launcher_exit_code: int | None = None  # of torchrun (or of the plain program); None: we killed it
    launcher_signal: int | None = None
    launcher_monotonic: float | None = None  # when its end was noticed
    launcher_pid: int | None = None  # a rank's own pid where the program is started without torchrun
    launcher_lines: tuple[str, ...] = ()
    has_session: bool = False
    hang: Hang | None = None  # it was ended for this
    trouble: Trouble | None = None  # or for this
    stacks: dict[int, str] = field(
        default_factory=dict
    )  # by rank: all threads of it, as faulthandler writes them


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The root cause of an attempt's end, in plain words."""

    kind: FailureKind
    reason: str
    attempt: int
    time: float
    rank: int | None = None
    step: int | None = None
    signal: int | None = None
    exit_code: int | None = None
    exception: str | None = None  # type and message on one line
    trouble: TroubleKind | None = None  # of numbers that went wrong, as the guard saw it
    limit: float | None = None  # … what the loss had to exceed to be a spike
    good: int | None = None  # … the last step in which they were in order
    batches: dict[str, int] = field(default_factory=dict)  # … and what a step took of each data loader

    @property
    def fingerprint(self) -> str:
        """Equal for two failures that are the same deterministic error at the same step.

        An exception is what it says, however its process ended after it: in order, by our own hand, or aborted by a library
        in its destructors. Object addresses differ every time, and so do the amounts in an out-of-memory error.
        """
        if self.exception is None:
            return f"{self.kind}|{self.step}|{self.exit_code}|{self.signal}"
        exception = re.sub(r"0x[0-9a-fA-F]+", "0x", self.exception)
        if self.kind is FailureKind.CUDA_OOM:
            exception = re.sub(r"[0-9.]+ ?(bytes|[KMG]i?B)?", "#", exception)
        return f"{self.kind}|{self.step}|{exception}"
