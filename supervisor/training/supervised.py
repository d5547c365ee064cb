"""The keeper of a Session under ``everstep run``: save points by the control page, the rest over the link.

The worker's half of the save protocol; its theory is in ``decide/savepoint.py``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from supervisor.checkpoint.pieces import Range
from supervisor.decide.guard import GuardPolicy, Known
from supervisor.decide.savepoint import Move, judge_word
from supervisor.edge.control import SLOTS, Phase, ProposalFlag, ProposalState, Word, offered_slot
from supervisor.edge.link import Link
from supervisor.errors import CheckpointError, ProtocolError, StorageError
from supervisor.model import Skip
from supervisor.training.keeper import NEVER, Candidate, Target

_NAP: Final = 0.0002  # seconds between two looks at the page
_ANSWER: Final = 5.0  # seconds that a request may take to become a proposal before training goes on
SLOT_PATIENCE: Final = 60.0  # seconds that a save may wait for a free slot
_ASKED: Final = 20_000  # ranges in one message, which has a limit
_UNSETTLED: Final = 1 << 63  # no PROPOSAL word looks like this


class Supervised:
    """Saves to the slots of the runtime directory when the supervisor says so."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.words = link.page.words
        self.attempt = link.attempt
        self._every = tuple(int(steps) for steps in link.welcome.get("save_every_steps") or ())
        self.due = 0
        self.settled = _UNSETTLED
        guard = link.welcome.get("guard")
        self.guard = GuardPolicy(**guard) if guard else None
        self.skips: tuple[Skip, ...] = ()
        self.known = Known()
        self._served = 0
        self._requested: int | None = None
        self._offer = self._last_offer = (
            0  # the supervisor's words: the one taken up, and the last that was used
        )

    def candidate(self) -> Candidate | None:
        """What the supervisor has chosen for all ranks."""
        answer = self._link.ask("resume", deadline=None)
        self.skips = tuple(Skip(**skip) for skip in answer.get("skips") or ())
        self.known = Known(**answer.get("known") or {})
        if not answer.get("path"):
            return None
        need = self._need if answer.get("on_demand") else None
        return Candidate(Path(answer["path"]), int(answer["step"]), need)

    def _need(self, wanted: Mapping[str, list[Range]]) -> None:
        ranges = [(name, one) for name, each in wanted.items() for one in each]
        for begin in range(0, len(ranges), _ASKED):
            files: dict[str, list[Range]] = defaultdict(list)
            for name, one in ranges[begin : begin + _ASKED]:
                files[name].append(one)
            answer = self._link.ask("need", deadline=None, files=files)
            if "problem" in answer:
                raise (CheckpointError if answer["damaged"] else StorageError)(answer["problem"])

    def rejected(self, candidate: Candidate, reason: str, *, damaged: bool) -> bool:
        """The supervisor decides in the next attempt."""
        self._link.tell("rejected", path=str(candidate.path), reason=reason, damaged=damaged)
        return False

    def wants(self, completed: int) -> ProposalFlag | None:
        """A multiple of an agreed interval, or a proposal for this step."""
        words = self.words
        flags: ProposalFlag | None = None
        if any(completed % every == 0 for every in self._every):
            flags = ProposalFlag(0)
        told = False
        patience = time.monotonic() + _ANSWER
        while True:
            word = words[Word.PROPOSAL]
            step = words[Word.PROPOSAL_STEP]
            move = judge_word(word, step, completed, self._served)
            if move is Move.SAVE:
                self._served = word >> 2
                self._requested = None
                flags = (flags or ProposalFlag(0)) | ProposalFlag(words[Word.PROPOSAL_FLAGS])
            elif move is Move.VIOLATION:
                raise ProtocolError(f"a save at step {step} was committed, but this rank is at {completed}")
            elif move is Move.WAIT or self._awaits_proposal(word, step, completed, patience):
                if not told:
                    told = True
                    self._link.tell("waiting", step=completed)
                self._nap()
                continue
            break
        lies_ahead = step > completed and word & 3 in (ProposalState.PROPOSED, ProposalState.COMMITTED)
        self.settled = _UNSETTLED if lies_ahead else word
        self._plan(completed)
        return flags

    def offer(self, completed: int, flags: ProposalFlag) -> tuple[int, int]:
        """The free slot; a save that was asked for waits a while for one, a periodic one is skipped."""
        patience = time.monotonic() + SLOT_PATIENCE
        while True:
            word = self.words[Word.FREE_SLOT]
            slot = offered_slot(word)
            if slot is not None and word != self._last_offer:
                self._offer = word
                return slot + 1, 0
            if not flags:
                return 0, 0
            if time.monotonic() > patience:
                reason = f"no slot was free for {SLOT_PATIENCE:g} s"
                self._link.tell("save_failed", step=completed, slot=-1, reason=reason)
                return 0, 0
            self._nap()

    def target(self, code: int, completed: int) -> Target:
        """The slot's directory."""
        return Target(code, self.slots[code - 1])

    @property
    def slots(self) -> list[Path]:
        """Where snapshots go."""
        return [self._link.runtime / "slots" / str(index) for index in range(SLOTS)]

    def prepare(self, target: Target) -> None:
        """The writer clears a slot; the supervisor has declared it void before it offered it."""

    def agreed(self, completed: int, due: int) -> None:
        """Every rank knows by itself what comes next."""
        self._plan(completed)

    def saved(
        self,
        target: Target,
        completed: int,
        seconds: float,
        size: int,
        metrics: dict[str, float],
        names: Collection[str],
    ) -> str | None:
        """Tell it; the supervisor declares the snapshot whole when every rank has."""
        self._last_offer = self._offer
        self.words[Word.SAVED_NS] = time.monotonic_ns()
        self.words[Word.SAVED_STEP] = completed + 1
        self._link.tell(
            "saved", step=completed, slot=target.code - 1, seconds=seconds, bytes=size, metrics=metrics
        )
        return None

    def failed(self, target: Target, completed: int, reason: str, *, torn: bool) -> None:
        """Tell it; another slot will be offered."""
        self._last_offer = self._offer
        self._link.tell("save_failed", step=completed, slot=target.code - 1, reason=reason, torn=torn)

    def request(self, step: int) -> None:
        """Have the supervisor propose that step."""
        if self._requested != step:
            self._requested = step
            self._link.tell("request", step=step)
        self.due = min(self.due, step)

    def tell(self, kind: str, **values: object) -> None:
        """Send it."""
        self._link.tell(kind, **values)

    def close(self) -> None:
        """The link outlives the Session."""

    def _awaits_proposal(self, word: int, step: int, completed: int, patience: float) -> bool:
        """Whether a request for this step was made and not yet answered by a proposal for it or a later one."""
        if self._requested is None or self._requested > completed:
            return False
        answered = word & 3 in (ProposalState.PROPOSED, ProposalState.COMMITTED) and step > completed
        if answered or time.monotonic() > patience:
            self._requested = None
            return False
        return True

    def _nap(self) -> None:
        self.words[Word.HEARTBEAT_NS] = time.monotonic_ns()
        time.sleep(_NAP)

    def _plan(self, completed: int) -> None:
        self.due = min(((completed // every + 1) * every for every in self._every), default=NEVER)
        if self._requested is not None:
            self.due = min(self.due, self._requested)


def set_phase(words: memoryview, phase: Phase) -> Phase:
    """Publish what this worker does now, with a heartbeat; returns what it did before."""
    before = Phase(words[Word.PHASE])
    words[Word.HEARTBEAT_NS] = time.monotonic_ns()
    words[Word.PHASE] = phase
    return before
