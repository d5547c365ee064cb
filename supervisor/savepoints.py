"""Agreed saves: drives the proposal words of one attempt's control pages (theory in ``decide/savepoint.py``).

At most one proposal is out at a time. What is wanted meanwhile is gathered and proposed when the one before it has been
served, so a stop asked for during a periodic save follows right behind it.
"""

from __future__ import annotations

from supervisor.attempt import Attempt
from supervisor.decide import rollback, savepoint
from supervisor.edge import clock
from supervisor.edge.control import Word
from supervisor.model import ProposalFlag, ProposalState, Skip

OVERDUE = 64  # steps that all ranks are past a proposal without its snapshot: it was skipped, propose anew
ATTEMPTS = 4  # proposals in a row before the loop gets on with other things


class SavePoints:
    """The proposals to one attempt's ranks."""

    def __init__(self, attempt: Attempt, skips: tuple[Skip, ...] = ()) -> None:
        self._attempt = attempt
        self._skips = skips  # ranks jump over these
        self._serial = 0
        self._state = ProposalState.NONE
        self._step = 0  # of the newest proposal
        self._out: ProposalFlag | None = None  # what the committed proposal not yet served is for
        self._wanted: ProposalFlag | None = None
        self._request: int | None = None
        self._standing: dict[int, int] = {}  # rank → the step it said it waits at
        self.rate: float | None = None  # steps a second, for the lead a proposal needs

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted and nothing is out."""
        return self._out is None and self._wanted is None

    def want(self, flags: ProposalFlag) -> None:
        """Have all ranks save soon, at one step."""
        self._wanted = flags | (self._wanted or ProposalFlag(0))
        self.pump()

    def recall_stop(self) -> bool:
        """Nobody wants a stop any more: whether no rank has heard of it yet."""
        if self._wanted is None or not self._wanted & ProposalFlag.STOP:
            return False
        self._wanted &= ~ProposalFlag.STOP
        return True

    def request(self, step: int) -> None:
        """A rank asks for a checkpoint at ``step``: that very step if all can still make it."""
        if self._out is not None and self._step == step:
            self._out |= ProposalFlag.CHECKPOINT
            return
        self._request = step
        self.want(ProposalFlag.CHECKPOINT)

    def standing(self, rank: int, step: int) -> None:
        """A rank has stopped at ``step`` until it gets a verdict."""
        self._standing[rank] = step
        self.pump()

    def pump(self) -> None:
        """Propose what is wanted, if nothing else is out and every rank is in its training loop."""
        steps = self._attempt.steps
        if self._out is not None and steps and min(steps) > self._step + OVERDUE:
            self._wanted, self._out = self._out | (self._wanted or ProposalFlag(0)), None
        if self._wanted is None or self._out is not None or not self._attempt.in_session:
            return
        if not savepoint.may_propose(self._state, self._step, steps):
            return
        for aborted in range(ATTEMPTS):
            if self._propose(self._wanted, aborted):
                self._out, self._wanted = self._wanted, None
                return

    def served(self, step: int) -> ProposalFlag:
        """A snapshot of ``step`` is complete on all ranks: what it was asked for, if it was."""
        flags = ProposalFlag(0)
        if self._out is not None and step >= self._step:
            flags, self._out = self._out, None
        self.pump()
        return flags

    def failed(self, step: int, reason: str = "") -> None:
        """The save at ``step`` came to nothing: nothing is out any more; a stop is asked for again."""
        if self._out is not None and step >= self._step:
            flags, self._out = self._out, None
            if flags & ProposalFlag.STOP:
                self._wanted = flags | (self._wanted or ProposalFlag(0))

    def _propose(self, flags: ProposalFlag, aborted: int) -> bool:
        lead = savepoint.margin(self.rate, aborted)
        request, self._request = self._request, None
        if request is None:
            step = savepoint.propose(self._attempt.steps, lead)
        else:
            step = savepoint.propose_request(request, self._attempt.steps, lead)
        step = rollback.past(step, self._skips)
        if not savepoint.in_reach(step, self._attempt.total_steps):
            return False  # the last step is a save point by itself
        self._serial, self._step = self._serial + 1, step
        pages = [seat.page for seat in self._attempt.seats.values()]
        for page in pages:
            page[Word.PROPOSAL_STEP], page[Word.PROPOSAL_FLAGS] = step, int(flags)
        self._publish(ProposalState.PROPOSED)
        clock.pause(savepoint.SETTLE_SECONDS)
        self._publish(savepoint.judge(step, self._attempt.steps, self._standing_at(step)))
        return self._state is ProposalState.COMMITTED

    def _publish(self, state: ProposalState) -> None:
        self._state = state
        for seat in self._attempt.seats.values():
            seat.page[Word.PROPOSAL] = savepoint.word(self._serial, state)

    def _standing_at(self, step: int) -> set[int]:
        return {i for i, rank in enumerate(self._attempt.seats) if self._standing.get(rank) == step}
