"""One save on all nodes, agreed without a collective: the leader's half and the node's half.

On one node ``savepoint`` has the supervisor write a proposal to all pages, look whether a rank has passed the step, and commit or
abort at once. Here nobody sees all pages, so the look is the nodes' and the verdict the leader's:

    leader                                          node
    L1  order (serial, S, PROPOSED)
                                                    N1  the proposal on all its pages; settle; look
                                                    N2  report (serial, confirmed) if no rank of it has passed S, else refused;
                                                        refused: ABORTED on its pages, at once
    L2  all confirmed: order (serial, S, COMMITTED)
        any refused, or one is silent: ABORTED
                                                    N3  the verdict on all its pages

*All ranks save S, or none does.* Let S be committed. Then every node had confirmed: by the argument in ``savepoint`` each of its
ranks had not passed S when it looked, and reads PROPOSED, or a later word of the same serial, when it gets there. It waits for
the verdict. A node that has confirmed never takes its word back by itself: only the leader's order, or the end of the attempt, ends
the wait. And an order has one writer at a time: it is replaced by compare-and-set, so that of a leader that aborts and one that
commits one wins, and the other has to read what is so.

*Orders are states, and some are never seen.* A node may see serial n+1 and have missed the verdict on n. So n+1 may only be
ordered when that does not matter: after an abort (who sees n+1 takes n for aborted, as it was), or when every rank is known to have
passed the committed step (who has passed it has got the verdict). The same rule as on one node, ``savepoint.may_propose``. The
serial also tells what a late report is about: an answer to another serial is none.

*Nobody waits for ever.* A rank waits from its node's N1 to N3. The leader may abort whenever it likes until it has committed, and
does after PATIENCE. A leader that dies leaves its last order, and the next leader goes on with that. A node that hears of no order
any more has lost the store: its attempt ends when it needs a decision, and this is one (``fencing``).

*A bad moment costs little.* What the leader knows of the ranks' steps is as old as their last report. A proposal that comes too late is
refused, and the refusal says how far the ranks are: the next one is made from fresh numbers, with twice the lead.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from supervisor.decide import rollback, savepoint
from supervisor.fleet import Answer, Proposal
from supervisor.model import ProposalFlag, ProposalState, Skip

PATIENCE: Final = 2.0  # seconds that a node may take to answer
OVERDUE: Final = 64  # steps that all ranks are past a committed step without its snapshot: it was skipped
ROUND: Final = 0.02  # seconds that a round takes at least, for the lead
DOUBLINGS: Final = 4  # of the lead
_NOTHING: Final = ProposalFlag(0)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a node of the attempt last said of itself. ``first`` and ``last``: completed steps of its slowest and fastest rank."""

    in_session: bool = False
    first: int = 0
    last: int = 0
    total_steps: int | None = None
    answer: Answer = field(default_factory=Answer)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The leader's half, of one attempt."""

    attempt: int
    proposal: Proposal = field(default_factory=Proposal)
    wanted: ProposalFlag | None = None
    request: int | None = None  # the step that a rank has asked for
    out: ProposalFlag | None = None  # what the proposal is for that was made and is not served yet
    since: float = 0.0  # when it was made
    aborted: int = 0  # proposals in a row
    round: float = ROUND  # seconds that the last one took

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted and nothing is out."""
        return self.wanted is None and self.out is None

    @property
    def is_open(self) -> bool:
        """Whether a proposal waits for its verdict."""
        return self.proposal.state is ProposalState.PROPOSED and self.proposal.attempt == self.attempt


def want(agreement: Agreement, flags: ProposalFlag) -> Agreement:
    """All ranks are to save soon, at one step."""
    return replace(agreement, wanted=flags | (agreement.wanted or _NOTHING))


def request(agreement: Agreement, step: int) -> Agreement:
    """A rank asks for a checkpoint of ``step``: that very step if all can still make it."""
    proposal = agreement.proposal
    if agreement.out is not None and proposal.step == step:
        return replace(agreement, out=agreement.out | ProposalFlag.CHECKPOINT)
    return replace(want(agreement, ProposalFlag.CHECKPOINT), request=step)


def recall_stop(agreement: Agreement) -> Agreement | None:
    """Nobody wants a stop any more; None where some rank may have heard of it."""
    if agreement.wanted is None or not agreement.wanted & ProposalFlag.STOP:
        return None
    return replace(agreement, wanted=agreement.wanted & ~ProposalFlag.STOP)


def look(
    agreement: Agreement,
    standings: Sequence[Standing],
    rate: float | None,
    now: float,
    skips: tuple[Skip, ...] = (),
) -> Agreement:
    """What is to be ordered now, given what every node of the attempt has said. ``rate``: steps a second; ``skips``: ranks jump over these."""
    if not standings:
        return agreement
    if agreement.is_open:
        return _judged(agreement, standings, now)
    steps = [standing.first for standing in standings]
    if agreement.out is not None and min(steps) > agreement.proposal.step + OVERDUE:
        agreement = replace(want(agreement, agreement.out), out=None)
    if agreement.wanted is None or agreement.out is not None:
        return agreement
    if not all(standing.in_session for standing in standings) or not _may_propose(agreement, steps):
        return agreement
    return _proposed(agreement, standings, rate, now, skips)


def served(agreement: Agreement, step: int) -> tuple[Agreement, ProposalFlag]:
    """A snapshot of ``step`` is whole on all nodes: what it was asked for, if it was.

    The step may have been a save point by itself, which all ranks have passed before they could see the proposal: no rank stops for
    one that is not committed, and its purpose is still to be served.
    """
    if not _is_for(agreement, step):
        return agreement, _NOTHING
    return replace(agreement, out=None), agreement.out or _NOTHING


def failed(agreement: Agreement, step: int) -> Agreement:
    """The save at ``step`` came to nothing; a stop is asked for again."""
    if not _is_for(agreement, step):
        return agreement
    flags, agreement = agreement.out or _NOTHING, replace(agreement, out=None)
    return want(agreement, flags) if flags & ProposalFlag.STOP else agreement


def _is_for(agreement: Agreement, step: int) -> bool:
    proposal = agreement.proposal
    is_committed = proposal.state is ProposalState.COMMITTED and proposal.attempt == agreement.attempt
    return agreement.out is not None and is_committed and step >= proposal.step


def _judged(agreement: Agreement, standings: Sequence[Standing], now: float) -> Agreement:
    proposal = agreement.proposal
    answers = [standing.answer for standing in standings]
    answered = [answer for answer in answers if answer.serial == proposal.serial]
    took = now - agreement.since
    if any(not answer.confirmed for answer in answered) or (len(answered) < len(answers) and took > PATIENCE):
        return replace(
            agreement,
            proposal=replace(proposal, state=ProposalState.ABORTED),
            wanted=(agreement.wanted or _NOTHING) | (agreement.out or _NOTHING),
            out=None,
            aborted=agreement.aborted + 1,
            round=max(ROUND, min(took, PATIENCE)),
        )
    if len(answered) < len(answers):
        return agreement
    return replace(
        agreement,
        proposal=replace(proposal, state=ProposalState.COMMITTED),
        aborted=0,
        round=max(ROUND, took),
    )


def _may_propose(agreement: Agreement, steps: Sequence[int]) -> bool:
    proposal = agreement.proposal
    if proposal.attempt != agreement.attempt:  # its ranks are gone
        return True
    return savepoint.may_propose(proposal.state, proposal.step, steps)


def _proposed(
    agreement: Agreement,
    standings: Sequence[Standing],
    rate: float | None,
    now: float,
    skips: tuple[Skip, ...],
) -> Agreement:
    last = [standing.last for standing in standings]
    # to the nodes and back, and as long again: reports may be as old
    lead = 1 + int((rate or 0.0) * 2 * agreement.round) << min(agreement.aborted, DOUBLINGS)
    if agreement.request is None:
        step = savepoint.propose(last, lead)
    else:
        step = savepoint.propose_request(agreement.request, last, lead)
    step = rollback.past(step, skips)
    agreement = replace(agreement, request=None)
    total = max((standing.total_steps or 0 for standing in standings), default=0)
    if not savepoint.in_reach(step, total or None):
        return agreement  # the last step is a save point by itself
    flags = agreement.wanted or _NOTHING
    proposal = Proposal(
        serial=agreement.proposal.serial + 1,
        attempt=agreement.attempt,
        step=step,
        flags=int(flags),
        state=ProposalState.PROPOSED,
    )
    return replace(agreement, proposal=proposal, wanted=None, out=flags, since=now)


# --------------------------------------------------------------------------- the node's half


class Duty(enum.Enum):
    """What a node does about the proposal in the order that it sees."""

    NOTHING = "nothing"
    ANSWER = "answer"  # write it on all pages, look, and report what came of it
    COMMIT = "commit"  # write the verdict on all pages
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True)
class Posted:
    """What stands on a node's pages: the serial of the proposal, and its state as this node knows it."""

    serial: int = 0
    state: ProposalState = ProposalState.NONE


def duty(posted: Posted, proposal: Proposal, attempt: int) -> Duty:
    """What to do. ``attempt``: the one whose pages these are. Raises nothing: an order that means nothing is ignored."""
    if proposal.attempt != attempt or proposal.serial < posted.serial:
        return Duty.NOTHING
    if proposal.serial > posted.serial:
        # what it did not live to see the verdict on was aborted, or there would be no other; what it sees too late needs no answer
        return Duty.ANSWER if proposal.state is ProposalState.PROPOSED else Duty.NOTHING
    if posted.state is not ProposalState.PROPOSED:
        return Duty.NOTHING
    match proposal.state:
        case ProposalState.COMMITTED:
            return Duty.COMMIT
        case ProposalState.ABORTED:
            return Duty.ABORT
        case _:
            return Duty.NOTHING
