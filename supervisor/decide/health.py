"""Does an attempt hang? From what its ranks' control pages say, and a clock that knows when nobody could look.

A hang is the absence of something, so everything here is about *not* seeing one that is none. A sign of life of a rank is

- progress: a step, a change of what it does, a wait of ours that goes on (its main thread writes that), and
- movement: its main thread runs Python code (its background thread sees that), as in an evaluation that nobody has
  announced. A main thread inside a collective, a sleep or a read does not move. So a loop of Python code that polls for ever is
  hardly ever found; a limit of the user's own (``fixed``) does not count movement.

Each rank may be *quiet*, without any of them, for as long as the stage that it is in allows:

=========  ================================================  ==========================================
stage      when                                              limit
=========  ================================================  ==========================================
start-up   before the attempt's first step, which compiles   ``startup``
step       between two steps                                 10 x the longest step of this attempt
save       a snapshot is being written                       10 x the longest save of this attempt
aside      ``session.phase(…)``: evaluation and the like     ``ceiling``
over       the training loop is over, the script goes on     none (the others': ``ceiling``)
leaving    the script has ended, the process has not         ``ceiling``
=========  ================================================  ==========================================

where what is learned stays between ``floor`` and ``ceiling``. One rank that is slow makes all others wait in their next
collective, so *one quiet rank is no hang*: only when every rank is past its limit does nothing move any more. (So a rank that
stands still while the others go on is not found. Nothing says that they need it.)

Where a limit would only guess, none is applied. Ranks of a script that has made no step, in this attempt or an earlier one, and
has no Session may be anything: a server, or a launcher that waits for the processes that train. Nor are ranks that have not
imported torch judged. (As soon as one judged rank hangs, they are taken to wait, or to be waited for, like the others.)

*Time counts only while the supervisor could look.* A laptop that sleeps, a virtual machine or a process tree that is stopped
misses looks itself: such a gap is left out, and after one that is long all limits start again. So they do while a debugger is
attached to any rank.

Which rank is at fault is told by what it is doing, best evidence first: it is stopped; its interpreter stands still altogether;
it is not at a place where one waits for other ranks while others are; it has done fewer steps; it stands alone elsewhere.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from supervisor.decide import stacks
from supervisor.failing import Hang, HangKind, HungRank

FACTOR: Final = 10.0
GAP: Final = 1.0  # seconds between two looks that are more than a busy machine
PAUSE: Final = 5.0  # a gap after which everything starts again
BEAT_LATE: Final = 2.0  # seconds without a beat (of some four a second) that mean something


class Stage(enum.StrEnum):
    """What a rank is doing, as far as limits go."""

    STARTUP = "start-up"
    STEP = "step"
    SAVE = "save"
    ASIDE = "evaluation"
    OVER = "after the training"
    LEAVING = "exit"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds. ``fixed``: the user's own limit for a step: only progress counts, nothing is learned."""

    startup: float
    floor: float
    ceiling: float
    fixed: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one rank's page says at one moment. Counters and marks: only whether they change matters."""

    rank: int
    stage: Stage
    step: int
    progress: int  # changes with every sign of progress
    movement: int  # changes while the main thread moves
    beat: int  # changes while the interpreter runs; 0: there is no background thread
    known: bool  # it is known to make steps
    longest_save: float = (
        0.0  # seconds, as the rank itself has measured; most are too short to be seen by looking
    )


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One rank over time; moments are of ``Health.clock``."""

    reading: Reading
    entered: float  # when its stage or step last changed
    progressed: float
    moved: float
    beaten: float
    longest_step: float = 0.0
    longest_save: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Health:
    """All that has been seen of one attempt. ``clock`` counts the seconds in which the supervisor was there to look."""

    clock: float = 0.0
    looked: float | None = None  # the time of the last look
    paused: float = 0.0  # seconds of the pause just found by this look; 0: there was none
    traces: Mapping[int, Trace] = field(default_factory=dict)


def observe(health: Health, readings: Iterable[Reading], now: float) -> Health:
    """Take in what the pages say at ``now`` (seconds of a monotonic clock)."""
    elapsed = max(0.0, now - health.looked) if health.looked is not None else 0.0
    clock = health.clock + min(elapsed, GAP)
    traces = {reading.rank: _follow(health.traces.get(reading.rank), reading, clock) for reading in readings}
    after = Health(clock=clock, looked=now, traces=traces)
    return replace(start_again(after), paused=elapsed) if elapsed > PAUSE else after


def start_again(health: Health) -> Health:
    """Every limit starts anew; what was learned stays."""
    clock = health.clock
    traces = {
        rank: replace(trace, progressed=clock, moved=clock, beaten=clock, entered=clock)
        for rank, trace in health.traces.items()
    }
    return replace(health, traces=traces)


def _follow(before: Trace | None, reading: Reading, clock: float) -> Trace:
    if before is None:
        return Trace(
            reading=reading, entered=clock, progressed=clock, moved=clock, beaten=clock,
            longest_save=reading.longest_save,
        )  # fmt: skip
    old = before.reading
    entered, step, save = before.entered, before.longest_step, max(before.longest_save, reading.longest_save)
    if (reading.stage, reading.step) != (old.stage, old.step):
        steps = reading.step - old.step
        if steps > 0 and old.stage is reading.stage is Stage.STEP:
            step = max(step, (clock - entered) / steps)
        elif old.stage is Stage.SAVE:
            save = max(save, clock - entered)
        entered = clock
    return Trace(
        reading=reading,
        entered=entered,
        progressed=clock if reading.progress != old.progress else before.progressed,
        moved=clock if reading.movement != old.movement else before.moved,
        beaten=clock if reading.beat != old.beat else before.beaten,
        longest_step=step,
        longest_save=save,
    )


# --------------------------------------------------------------------------- judging


def limit_of(trace: Trace, limits: Limits) -> float:
    """Seconds for which the rank may be quiet where it is now."""
    match trace.reading.stage:
        case Stage.STARTUP:
            return limits.startup
        case Stage.STEP if limits.fixed is not None:
            return limits.fixed
        case Stage.STEP:
            return _learned(trace.longest_step, limits)
        case Stage.SAVE if trace.longest_save:
            return _learned(trace.longest_save, limits)
        case _:
            return limits.ceiling


def _learned(longest: float, limits: Limits) -> float:
    return min(max(FACTOR * longest, limits.floor), max(limits.ceiling, limits.floor))


def quiet(trace: Trace, health: Health, limits: Limits) -> float:
    """Seconds since the rank's last sign of life."""
    strict = limits.fixed is not None and trace.reading.stage is Stage.STEP
    last = trace.progressed if strict else max(trace.progressed, trace.moved)
    return health.clock - last


def nearness(health: Health, limits: Limits) -> float:
    """How much of its limit the rank with the most time left has used: a hang at 1."""
    return min(
        (quiet(trace, health, limits) / limit_of(trace, limits) for trace in health.traces.values()),
        default=0.0,
    )


def judge(health: Health, limits: Limits, world_size: int | None) -> Hang | None:
    """The hang, if nothing moves any more. ``accuse`` says who is at fault."""
    traces = health.traces.values()
    if not traces or len(health.traces) != world_size or nearness(health, limits) <= 1:
        return None
    judged = [trace for trace in traces if _is_judged(trace)]
    if not judged:
        return None
    return Hang(
        kind=HangKind.MAIN_THREAD,
        monotonic=health.looked or 0.0,
        limit=max(limit_of(trace, limits) for trace in judged),
        ranks=tuple(_hung(trace, health, limits) for trace in sorted(traces, key=lambda t: t.reading.rank)),
    )


def _is_judged(trace: Trace) -> bool:
    reading = trace.reading
    return bool(reading.beat) and reading.known and reading.stage is not Stage.OVER


def _hung(trace: Trace, health: Health, limits: Limits) -> HungRank:
    return HungRank(
        rank=trace.reading.rank,
        step=trace.reading.step,
        stage=trace.reading.stage.value,
        quiet=round(quiet(trace, health, limits), 3),
        beat_quiet=round(health.clock - trace.beaten, 3) if trace.reading.beat else None,
    )


# --------------------------------------------------------------------------- who is at fault


def accuse(hang: Hang, states: Mapping[int, str], texts: Mapping[int, str]) -> Hang:
    """``hang`` with its kind and its suspects, from each rank's process state (a letter) and its stacks."""
    ranks = [_placed(rank, states.get(rank.rank, ""), texts.get(rank.rank, "")) for rank in hang.ranks]
    suspects = {rank.rank for rank in _suspects(ranks)}
    kind = next((_kind(rank) for rank in ranks if rank.rank in suspects), hang.kind)
    return replace(hang, kind=kind, ranks=tuple(replace(r, suspect=r.rank in suspects) for r in ranks))


def _placed(rank: HungRank, state: str, text: str) -> HungRank:
    frames = stacks.main_thread(text)
    return replace(rank, state=state, where=stacks.place(frames), waiting=stacks.is_wait(frames))


def _kind(rank: HungRank) -> HangKind:
    if rank.state == "T":
        return HangKind.STOPPED
    late = rank.beat_quiet is not None and rank.beat_quiet > max(BEAT_LATE, rank.quiet / 2)
    return HangKind.GIL if late else HangKind.MAIN_THREAD


def _suspects(ranks: Sequence[HungRank]) -> Sequence[HungRank]:
    for kind in (HangKind.STOPPED, HangKind.GIL):
        if found := [rank for rank in ranks if _kind(rank) is kind]:
            return found
    suspects = [rank for rank in ranks if rank.where is not None and not rank.waiting]
    if not suspects or len(suspects) == len(ranks):
        suspects = list(ranks)
    fewest = min(rank.step for rank in suspects)
    suspects = [rank for rank in suspects if rank.step == fewest]
    alone = [place for place, count in Counter(rank.where for rank in suspects).items() if count == 1]
    if len(suspects) > 2 and len(alone) == 1:
        suspects = [rank for rank in suspects if rank.where == alone[0]]
    return suspects


def reason(hang: Hang) -> str:
    """One paragraph for a tired person: who, where, for how long, and who waits."""
    if hang.kind is HangKind.SILENT:
        return f"no rank has written any output for {hang.limit:g} s (--hang-silence)"
    suspects = [rank for rank in hang.ranks if rank.suspect] or list(hang.ranks)
    others = [rank for rank in hang.ranks if rank not in suspects]
    if len(suspects) > 1 and not others:
        places = "; ".join(f"rank {rank.rank}{_at(rank)}" for rank in suspects[:4])
        why = (
            "all ranks wait for one another, in collectives that do not match"
            if all(rank.waiting for rank in suspects)
            else "no rank goes on, and which of them holds up the others cannot be told"
        )
        return f"{why} ({_since(suspects[0], hang)}): {places}"
    places = "; ".join(_at(rank).strip() for rank in suspects[:4] if rank.where)
    text = f"{_names(suspects)} {'hangs' if len(suspects) == 1 else 'hang'}{' ' if places else ''}{places}: "
    text += f"{_STUCK[hang.kind]} ({_since(suspects[0], hang)})"
    if others:
        where = next((_at(rank) for rank in others if rank.where), "")
        text += f"; {_names(others)} {'waits' if len(others) == 1 else 'wait'}{where}"
    return text


_STUCK: Final = {
    HangKind.MAIN_THREAD: "the main thread does not move",
    HangKind.GIL: "the interpreter stands still, since some code holds its lock (GIL)",
    HangKind.STOPPED: "the process was stopped (SIGSTOP)",
}


def _since(rank: HungRank, hang: Hang) -> str:
    step = f"after step {rank.step}, " if rank.step else ""
    kernel = ", it waits for the kernel" if rank.state == "D" else ""
    stage = f" in the {rank.stage} stage" if rank.stage != Stage.STEP else ""
    return f"{step}no sign of life for {rank.quiet:.0f} s{stage}, {hang.limit:.0f} s are allowed{kernel}"


def _at(rank: HungRank) -> str:
    return f" at {rank.where}" if rank.where else ""


def _names(ranks: Sequence[HungRank]) -> str:
    numbers = [str(rank.rank) for rank in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    shown = ", ".join(numbers[:8]) + (", …" if len(numbers) > 8 else "")
    return f"ranks {shown}"
