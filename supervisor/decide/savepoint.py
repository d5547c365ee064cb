"""How all ranks come to save the same step without a collective in the step loop.

Ranks drift: rank 0 may have completed step 120 while rank 3 is in 118, so "save now" would save different steps. The
supervisor picks a step S in the near future and every rank saves when it has completed S steps. The danger is a rank
that passes S without having heard. Per rank there are two words in shared memory, each with one writer:

    worker, at the end of every step           supervisor
    W1  STEP := completed                      S1  PROPOSAL_STEP := S, PROPOSAL_FLAGS := …      on every page
    W2  read PROPOSAL                          S2  PROPOSAL := (serial, PROPOSED)               on every page
        PROPOSED,  S == completed: wait        S3  let SETTLE_SECONDS pass
        COMMITTED, S == completed: save        S4  read every STEP
        else: go on                            S5  all < S: PROPOSAL := (serial, COMMITTED), else (serial, ABORTED)

*No rank passes S before the verdict, if the verdict is to commit.* Let S be committed. Rank r had STEP < S at S4, so its
W1 for S came after S4, and its W2 after that: it reads PROPOSED or COMMITTED, never an older word. It waits, or saves.
This is Dekker's argument and needs that neither side's write is overtaken by its own later read. Inside a CPU it can be
(a store buffer), for a few hundred nanoseconds. A fence in the worker would be paid at every step; instead the supervisor,
who is in no hurry, pays for both (as ``membarrier(2)`` does): by the end of S3 its own words are visible, and so is
the STEP of every rank whose W2 was too early to see them. SETTLE_SECONDS is a thousand times what that takes.

*Nobody waits for ever.* A rank waits only while the newest word is PROPOSED, and S5 follows S2 in bounded time whatever the
ranks do: it reads memory and asks nobody. After an abort all go on, and the next proposal is made with twice the margin.

*A rank that waits stands still*, so STEP == S is no obstacle when the supervisor knows that it waits (message
``waiting``): it cannot move until the verdict. The message needs no serial: S is ahead of all STEP when it is proposed, so
nobody can have waited at S before, for another proposal. STEP == S without that word is ambiguous (waiting with the
message under way, or past W2 before S2) and counts as passed. It must not be waited out: the rank may be in the collectives
of step S + 1, which the ranks that stand at S will never join.

*One word at a time.* S1 overwrites what the previous proposal said, so it may only begin when nobody can still be
reading that: after an abort (a rank that waited for it re-reads everything when the serial changes), or when every
rank has passed the committed step (``may_propose``). A worker remembers the serial it served and ignores it from then on.

A worker that finds a COMMITTED step behind it which it never served has found a bug of ours, and says so rather than
train on: some rank is saving a step that this one no longer has.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from typing import Final

from supervisor.model import ProposalState

#: between the last write of a proposal and the first read of the steps that judges it
SETTLE_SECONDS: Final = 0.001

_LARGEST_MARGIN: Final = 1 << 20


class Move(enum.Enum):
    """What a worker does at the end of a step."""

    GO_ON = "go on"
    WAIT = "wait"  # poll the word until it changes, then judge again
    SAVE = "save"
    VIOLATION = "violation"  # raise ProtocolError


def propose(steps: Sequence[int], margin: int) -> int:
    """A step that no rank has completed: ``margin`` (≥ 1) steps after the furthest one. ``steps``: every rank's STEP."""
    if not steps:
        raise ValueError("a save point needs at least one rank")
    return max(steps) + max(1, margin)


def propose_request(step: int, steps: Sequence[int], margin: int) -> int:
    """The step for a rank's request to save ``step``: that one if it is ahead of every rank, else as ``propose``."""
    return step if steps and max(steps) < step else propose(steps, margin)


def judge(step: int, steps_after: Sequence[int], standing: Collection[int] = ()) -> ProposalState:
    """COMMITTED or ABORTED for the proposal to save ``step``.

    ``steps_after`` must have been read SETTLE_SECONDS after the proposal was written to every page; ``standing`` are the
    indexes of the ranks that reported, since then, that they wait at ``step``. To be called at once: never wait for news.
    """
    return ProposalState.COMMITTED if _none_passed(step, steps_after, standing) else ProposalState.ABORTED


def may_propose(state: ProposalState, step: int, steps: Sequence[int]) -> bool:
    """Whether a new proposal may overwrite the last one, which was for ``step`` and is in ``state``."""
    if state is ProposalState.COMMITTED:
        return all(current > step for current in steps)
    return state is not ProposalState.PROPOSED


def in_reach(step: int, total_steps: int | None) -> bool:
    """Whether the ranks will complete ``step`` and go on; the last step is a save point without any agreement."""
    return total_steps is None or step < total_steps


def margin(rate: float | None, aborted: int = 0) -> int:
    """Steps of lead for a proposal: about 20 ms at ``rate`` steps a second, doubled with every abort in a row."""
    lead = 1 + int((rate or 0.0) * 0.02)
    return min(_LARGEST_MARGIN, lead << min(aborted, 20))


def word(serial: int, state: ProposalState) -> int:
    """What is written to PROPOSAL. Serials begin at 1 and grow by one with each proposal of an attempt."""
    return serial << 2 | state


def split_word(word: int) -> tuple[int, ProposalState]:
    """The serial and the state in a PROPOSAL word."""
    return word >> 2, ProposalState(word & 3)


def judge_word(word: int, step: int, completed: int, served: int) -> Move:
    """What a worker does that has published ``completed`` and then read PROPOSAL, and after it PROPOSAL_STEP.

    ``served`` is the serial of the newest proposal it has saved for; 0: none. On WAIT it polls until the *word* changes,
    reads PROPOSAL_STEP anew and judges again. On SAVE it sets ``served`` to ``word >> 2``, reads the flags, and saves.
    """
    state = word & 3
    if state in (ProposalState.NONE, ProposalState.ABORTED) or word >> 2 == served or step > completed:
        return Move.GO_ON
    if step < completed:  # passed before it was proposed: will be aborted
        return Move.VIOLATION if state == ProposalState.COMMITTED else Move.GO_ON
    return Move.WAIT if state == ProposalState.PROPOSED else Move.SAVE


def _none_passed(step: int, steps: Sequence[int], standing: Collection[int]) -> bool:
    return bool(steps) and all(
        current < step or (current == step and index in standing) for index, current in enumerate(steps)
    )
