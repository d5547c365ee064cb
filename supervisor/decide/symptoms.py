"""How failures look: what exceptions say, and what is left in the log of a program that does not tell us.

What kind of failure an exception is stands in one table, read from the top: the first line that fits decides. The words
are those of torch 2.11 to 2.15 (gloo's pair.cc and context.cc, NCCL, the TCPStore), of CUDA and of the operating system.
"""

from __future__ import annotations

import builtins
import re
import signal as signals
from collections.abc import Sequence
from dataclasses import dataclass, replace

from supervisor.model import FailureKind, Raised, RankEnd


@dataclass(frozen=True)
class Recogniser:
    """Fits an exception that is, or derives from, one of ``types`` (bare class names) and whose message has ``pattern``.

    An empty ``types`` fits every exception. ``startup``: only before the first step.
    """

    kind: FailureKind
    types: tuple[str, ...] = ()
    pattern: str = ""
    startup: bool = False

    def fits(self, raised: Raised, *, before_first_step: bool) -> bool:
        """Whether this line of the table is about ``raised``."""
        if self.startup and not before_first_step:
            return False
        names = {name.rpartition(".")[2] for name in (raised.type, *raised.bases)}
        if self.types and names.isdisjoint(self.types):
            return False
        return re.search(self.pattern, raised.message, re.IGNORECASE) is not None


#: what a broken link sounds like
COMMUNICATION = "|".join(
    (
        r"connection (closed|reset) by peer",
        r"connection refused",
        r"connection was likely closed",
        r"broken pipe",
        r"no route to host",
        r"gloo[/ ].*(timed? ?out|timeout|error|connect)",
        r"connectFullMesh failed",
        r"timed out waiting \d+ ?ms for (recv|send)",
        r"application timeout caused pair closure",
        r"(connect|socket|wait|store) timeout",
        r"failed to (recv|send), got \d+ bytes",
        r"watchdog caught collective operation timeout",
        r"nccl (communicator was aborted|error|watchdog|operation .* failed)",
        r"nccl(System|Remote|Internal)Error",
        r"process group .* (has been aborted|timeout)",
        r"client socket has (failed|timed out)",
    )
)

#: what a network or a service that will be back sounds like, in the words of the usual clients
NETWORK = "|".join(
    (
        r"name resolution|name or service not known|getaddrinfo failed|network is unreachable",
        r"connection timed out|read timed out|(connect|urlopen).* timed out|max retries exceeded with url",
        r"^(HTTP Error )?(429|5\d\d)\b",
        r"EOF occurred in violation of protocol|remote end closed connection",
    )
)
_HTTP_ERRORS = ("HTTPException", "HTTPError", "URLError", "SSLError", "RequestException", "HfHubHTTPError")

RECOGNISERS: tuple[Recogniser, ...] = (
    # ours
    Recogniser(FailureKind.STATE_MISMATCH, types=("StateMismatchError",)),
    Recogniser(FailureKind.STORAGE, types=("StorageError", "CheckpointError")),
    # the program cannot start
    Recogniser(FailureKind.STARTUP, types=("ImportError", "SyntaxError"), startup=True),
    Recogniser(FailureKind.STARTUP, types=("SystemExit",), pattern=r"^2$", startup=True),
    Recogniser(FailureKind.STARTUP, types=("UsageError", "ConfigError"), startup=True),
    # memory: before the device and before NCCL, which both wrap it
    Recogniser(FailureKind.CUDA_OOM, types=("OutOfMemoryError",)),
    Recogniser(
        FailureKind.CUDA_OOM, pattern=r"cuda (error|failure \d+):? '?out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    ),
    Recogniser(FailureKind.HOST_OOM, types=("MemoryError",)),
    Recogniser(FailureKind.HOST_OOM, pattern=r"DefaultCPUAllocator: .*(can't|not) (allocate|enough) memory"),
    # a device-side assert is an index out of range in the user's code, in spite of its words
    Recogniser(FailureKind.EXCEPTION, pattern=r"device-side assert"),
    Recogniser(
        FailureKind.DEVICE,
        pattern=r"\bXid\b|uncorrectable.*\bECC\b|\bECC error|GPU has fallen off the bus|cuda (error|failure)"
        r"|ncclUnhandledCudaError|CUBLAS_STATUS_|CUDNN_STATUS_|HIP error|no cuda gpus are available",
    ),
    # communication
    Recogniser(
        FailureKind.COMMUNICATION,
        types=("DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError"),
    ),
    Recogniser(FailureKind.COMMUNICATION, pattern=COMMUNICATION),
    Recogniser(
        FailureKind.COMMUNICATION,
        types=(
            "gaierror",
            "herror",
            "TimeoutError",
            "Timeout",
            "ConnectTimeout",
            "ReadTimeout",
            "IncompleteRead",
            "ClientConnectionError",
            "ClientConnectorError",
            "EndpointConnectionError",
            "ConnectError",
        ),
    ),
    Recogniser(FailureKind.COMMUNICATION, types=(*_HTTP_ERRORS, "OSError"), pattern=NETWORK),
    # numbers
    Recogniser(FailureKind.NUMERIC, types=("FloatingPointError",)),
    Recogniser(
        FailureKind.NUMERIC, pattern=r"\bnon-?finite\b|returned nan values|loss (is|became|was) (nan|inf)"
    ),
    # storage
    Recogniser(
        FailureKind.STORAGE, types=("OSError",), pattern=r"no space left|disk quota|read-only file system"
    ),
    Recogniser(FailureKind.STORAGE, types=("OSError",), pattern=r"input/output error|stale file handle"),
    # a data loader's process that was killed says so in its parent
    Recogniser(
        FailureKind.CRASH, pattern=r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)"
    ),
)


_EXCEPTION_LINE = re.compile(
    r"^(?:\[rank\d+\]: ?)?(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt))(?:: (?P<message>.*))?$"
)


#: a shell's words for "no such command" and "not executable"
_CANNOT_RUN = (126, 127)


def kind_of(end: RankEnd, *, before_first_step: bool) -> FailureKind:
    """What kind of failure this end would be, taken by itself."""
    if end.oom_killed:
        return FailureKind.HOST_OOM
    if end.raised is not None:
        return kind_of_exception(end.raised, before_first_step=before_first_step)
    if end.signal == signals.SIGABRT:
        return _aborted_over(end.last_lines)
    if end.signal is not None:
        return FailureKind.CRASH
    if end.exit_code == 0:
        return FailureKind.EARLY_EXIT
    if before_first_step and end.exit_code in (2, *_CANNOT_RUN):
        return FailureKind.STARTUP
    return FailureKind.EXCEPTION


def kind_of_exception(raised: Raised, *, before_first_step: bool) -> FailureKind:
    """The first line of the table that fits; EXCEPTION when none does."""
    fitting = (line.kind for line in RECOGNISERS if line.fits(raised, before_first_step=before_first_step))
    return next(fitting, FailureKind.EXCEPTION)


#: exceptions that another rank's death may have caused, and an exit that an exception like that may be behind
_ECHOES = (FailureKind.COMMUNICATION, FailureKind.DEVICE)


def may_be_echo(raised: Raised | None) -> bool:
    """Whether a rank that fails like this (None: with a code alone) may do so because another one has died.

    The traceback is looked through as well: scripts catch what a broken link raises and raise something of their own.
    """
    if raised is None or kind_of_exception(raised, before_first_step=False) in _ECHOES:
        return True
    return re.search(COMMUNICATION, raised.traceback, re.IGNORECASE) is not None


def lost_a_process(raised: Raised | None) -> bool:
    """Whether it raised because a data loader's process was killed by SIGKILL."""
    pattern = r"DataLoader worker \(pid.*\) is killed by signal: Killed"
    return raised is not None and re.search(pattern, raised.message) is not None


def _aborted_over(lines: Sequence[str]) -> FailureKind:
    """C++ threads (NCCL's watchdog) cannot raise: they print what is wrong and abort the process."""
    for line in lines:
        kind = kind_of_exception(Raised(type="abort", message=line, traceback=""), before_first_step=False)
        if kind in (FailureKind.CUDA_OOM, FailureKind.DEVICE, FailureKind.COMMUNICATION):
            return kind
    return FailureKind.CRASH


# --------------------------------------------------------------------------- programs that do not tell us


#: what may end a rank that has run its script to the end
LATE_SIGNALS = (signals.SIGABRT, signals.SIGSEGV, signals.SIGTERM)


def complete(end: RankEnd) -> RankEnd:
    """The end as it was meant: shells' codes for signals, exceptions found in the log, a clean exit that crashed late.

    A rank that said it exits with 0 ran its script to the end; gloo's threads may still abort it in its destructors, and
    torchrun then terminates the others where they are.
    """
    if end.told_exit_code == 0 and end.signal in LATE_SIGNALS:
        return replace(end, exit_code=0, signal=None)
    code = end.exit_code
    if end.raised is not None or end.signal is not None or not code:
        return end
    if 128 < code < 128 + signals.NSIG:
        return replace(end, exit_code=None, signal=code - 128)
    return replace(end, raised=exception_in(end.last_lines))


def exception_in(lines: Sequence[str]) -> Raised | None:
    """The exception whose traceback ends a log, if one does."""
    starts = [number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    for line in reversed(lines[starts[-1] :] if starts else ()):
        if match := _EXCEPTION_LINE.match(line):
            name = match["type"]
            return Raised(type=name, message=match["message"] or "", traceback="", bases=_known_bases(name))
    return None


_ROOT_CAUSE = re.compile(
    r"^Root Cause \(first observed failure\):.*?^\s*rank\s*: (?P<rank>\d+)"
    r".*?^\s*exitcode\s*: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)",
    re.DOTALL | re.MULTILINE,
)


def root_cause_in(lines: Sequence[str]) -> RankEnd | None:
    """The rank that torchrun's closing summary names, for workers that never registered (``--no-python``)."""
    match = _ROOT_CAUSE.search("\n".join(lines))
    if match is None:
        return None
    code = int(match["code"])
    end = RankEnd(
        rank=int(match["rank"]),
        pid=int(match["pid"]),
        monotonic=0.0,
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
    )
    return complete(end)


def _known_bases(name: str) -> tuple[str, ...]:
    """The bases of a builtin exception of which only the name is known."""
    kind = getattr(builtins, name, None)
    return tuple(base.__name__ for base in kind.__mro__) if isinstance(kind, type) else ()
