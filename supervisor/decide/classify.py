"""From the evidence of an attempt that ended to its root cause, in plain words.

When one rank of a job dies, the others soon fail too: their collectives lose a peer. torchrun then takes down what is left
and exits with an error of its own. So most of what is seen is a consequence, and the cause is *the first end, by monotonic
time, that is no consequence*. Consequences are, whenever there is an end that is none:

- communication errors, in the words of gloo, NCCL, torch's store or the operating system's sockets, and NCCL's watchdog
  taking its process down with SIGABRT over one;
- SIGTERM to a rank: torchrun tidying up;
- torchrun's own exit with a code. (It ignores the signals sent to the job, so a *signal* that ends it before a rank ended
  is a cause of its own: then the ranks' ends are consequences, as they die with their parent.)

If there is no other end, a communication error is the cause: a link broke, or a rank hung. A rank that left with code 0
before its Session had left the loop, while others had not, is a cause too: nothing was wrong with it, but its peers wait.
So is one that left the loop in order but before the last step (``break`` on one rank only), if others lost a peer: even if
they were noticed first, as it closes its connections a while before its process ends.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Sequence
from dataclasses import replace

from supervisor.decide import guard, health, symptoms
from supervisor.model import AttemptEvidence, Failure, FailureKind, Hang, Raised, RankEnd, Trouble


def classify(evidence: AttemptEvidence, time: float) -> Failure | None:
    """The root cause of an attempt's end; None when it finished: every rank exited with code 0 by itself."""
    evidence = _as_meant(evidence)
    if evidence.hang is not None and all(end.monotonic >= evidence.hang.monotonic for end in evidence.ends):
        return _hang(evidence, evidence.hang, time)
    trouble = evidence.trouble
    if trouble is not None and all(end.monotonic >= trouble.monotonic for end in evidence.ends):
        return _trouble(evidence, trouble, time)
    if _finished(evidence):
        return None
    if _launcher_died_first(evidence):
        return _launcher(evidence, time)
    suspects = [end for end in evidence.ends if not _left_in_order(end, evidence)]
    cause = next((end for end in suspects if not _is_consequence(end, evidence)), None)
    if cause is not None:
        return _failure(cause, evidence, time)
    # nobody but those who lost a peer: one that left before them, if only with code 0, may be the peer they lost
    left = next((end for end in evidence.ends if _left_others_waiting(end, bool(suspects))), None)
    if left is not None and (left.closed or not suspects or left.monotonic <= suspects[0].monotonic):
        return _early_exit(left, evidence, time)
    if suspects or evidence.ends:
        return _failure((suspects or evidence.ends)[0], evidence, time)
    return _launcher(evidence, time)


def _as_meant(evidence: AttemptEvidence) -> AttemptEvidence:
    """Ends in the order of time, each completed; without any, the one that torchrun's summary names."""
    ends = sorted(map(symptoms.complete, evidence.ends), key=lambda end: end.monotonic)
    if not ends and evidence.launcher_exit_code and evidence.world_size is None:
        named = symptoms.root_cause_in(evidence.launcher_lines)
        ends = [named] if named is not None else []
    if any(end.pid == evidence.launcher_pid for end in ends):  # no torchrun: the program is its own launcher
        evidence = replace(evidence, launcher_exit_code=None, launcher_signal=None)
    return replace(evidence, ends=tuple(ends))


def _finished(evidence: AttemptEvidence) -> bool:
    if any(end.exit_code != 0 for end in evidence.ends):
        return False
    if evidence.world_size is not None and len(evidence.ends) >= evidence.world_size:
        return True
    return evidence.launcher_exit_code == 0


def _left_in_order(end: RankEnd, evidence: AttemptEvidence) -> bool:
    """Code 0 is in order after the loop, and in a program without a Session always."""
    return end.exit_code == 0 and (end.closed or not evidence.has_session)


def _left_others_waiting(end: RankEnd, others_failed: bool) -> bool:
    """It left with code 0 and did not finish: out of its loop, or in order but, as it said, before the last step."""
    return end.exit_code == 0 and (not end.closed or (end.completed is False and others_failed))


def _is_consequence(end: RankEnd, evidence: AttemptEvidence) -> bool:
    if end.oom_killed:
        return False
    return end.signal == signals.SIGTERM or _kind(end, evidence) is FailureKind.COMMUNICATION


def _launcher_died_first(evidence: AttemptEvidence) -> bool:
    if evidence.launcher_signal is None:
        return False
    if evidence.launcher_monotonic is not None:
        return all(evidence.launcher_monotonic <= end.monotonic for end in evidence.ends)
    return all(end.signal is not None or _is_consequence(end, evidence) for end in evidence.ends)


def _kind(end: RankEnd, evidence: AttemptEvidence) -> FailureKind:
    return symptoms.kind_of(end, before_first_step=not end.step and not evidence.step)


# --------------------------------------------------------------------------- in plain words


def _failure(end: RankEnd, evidence: AttemptEvidence, time: float) -> Failure:
    kind = _kind(end, evidence)
    if kind is FailureKind.EARLY_EXIT:
        return _early_exit(end, evidence, time)
    return Failure(
        kind=kind,
        reason=f"rank {end.rank} {_what(kind, end)} ({_when(end.step)}){_last_words(end)}",
        attempt=evidence.attempt,
        time=time,
        rank=end.rank,
        step=end.step,
        signal=end.signal,
        exit_code=end.exit_code,
        exception=_one_line(end.raised) if end.raised else None,
    )


_WORDS: dict[FailureKind, str] = {
    FailureKind.CUDA_OOM: "ran out of GPU memory",
    FailureKind.HOST_OOM: "ran out of host memory",
    FailureKind.DEVICE: "lost its device",
    FailureKind.COMMUNICATION: "could not reach its peers",
    FailureKind.STATE_MISMATCH: "cannot take the saved state",
    FailureKind.STORAGE: "was let down by storage",
    FailureKind.NUMERIC: "met numbers that are not finite",
}


def _what(kind: FailureKind, end: RankEnd) -> str:
    if end.oom_killed and end.raised is not None:
        return "lost a data loader process, which the kernel killed because the host (or its cgroup) ran out of memory"
    if end.oom_killed:
        return "was killed by the kernel because the host (or its cgroup) ran out of memory"
    if end.raised is not None:
        what = _WORDS.get(kind)
        return f"{what}: {_one_line(end.raised)}" if what else f"raised {_one_line(end.raised)}"
    if end.signal is not None:
        return f"was killed by {signal_name(end.signal)}"
    return "ended without a trace of why" if end.exit_code is None else f"exited with code {end.exit_code}"


def _early_exit(end: RankEnd, evidence: AttemptEvidence, time: float) -> Failure:
    return Failure(
        kind=FailureKind.EARLY_EXIT,
        reason=f"rank {end.rank} exited with code 0 while other ranks went on ({_when(end.step)})",
        attempt=evidence.attempt,
        time=time,
        rank=end.rank,
        step=end.step,
        exit_code=0,
    )


def _hang(evidence: AttemptEvidence, hang: Hang, time: float) -> Failure:
    suspects = [rank for rank in hang.ranks if rank.suspect]
    only = suspects[0] if len(suspects) == 1 else None
    step = only.step if only is not None else evidence.step
    return Failure(
        kind=FailureKind.HANG,
        reason=health.reason(hang),
        attempt=evidence.attempt,
        time=time,
        rank=only.rank if only is not None else None,
        step=step or None,
    )


def _trouble(evidence: AttemptEvidence, trouble: Trouble, time: float) -> Failure:
    return Failure(
        kind=FailureKind.NUMERIC,
        reason=guard.reason(trouble),
        attempt=evidence.attempt,
        time=time,
        rank=trouble.rank,
        step=trouble.step,
        trouble=trouble.kind,
        limit=trouble.limit,
        good=trouble.good,
        batches=trouble.batches,
    )


def _launcher(evidence: AttemptEvidence, time: float) -> Failure:
    """The launcher ended and no rank explains it."""
    raised = symptoms.exception_in(evidence.launcher_lines)
    usage = evidence.launcher_exit_code == 2 and evidence.world_size is None
    if evidence.launcher_signal is not None:
        what, said = f"the launcher was killed by {signal_name(evidence.launcher_signal)}", ""
    elif evidence.launcher_exit_code is not None:
        what = f"the launcher exited with code {evidence.launcher_exit_code}"
        said = f": {_one_line(raised)}" if raised else _quoted(evidence.launcher_lines)
    else:
        what, said = "the attempt ended and left no trace of why", ""
    when = "before any worker registered" if evidence.world_size is None else _when(evidence.step)
    return Failure(
        kind=FailureKind.STARTUP if usage else FailureKind.LAUNCHER,
        reason=f"{what} ({when}){said}",
        attempt=evidence.attempt,
        time=time,
        step=evidence.step,
        signal=evidence.launcher_signal,
        exit_code=evidence.launcher_exit_code,
        exception=_one_line(raised) if raised else None,
    )


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 99`` for one without a name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _when(step: int | None) -> str:
    return f"after step {step}" if step else "before its first step"


def _one_line(raised: Raised) -> str:
    name = raised.type.removeprefix("builtins.")
    message = next((line.strip() for line in raised.message.splitlines() if line.strip()), "")
    return _shortened(f"{name}: {message}" if message else name)


def _last_words(end: RankEnd) -> str:
    """What an exit code alone leaves unsaid is often in the last line of the log (argparse's, sys.exit's)."""
    return _quoted(end.last_lines) if end.exit_code and end.raised is None else ""


def _quoted(lines: Sequence[str]) -> str:
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    return f": {_shortened(last)}" if last else ""


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
