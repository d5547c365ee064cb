"""Notices during a run: what a source says is journalled, said, and answered (what each asks for: ``decide/notices.py``).

A source is a stranger's server on the network. Whatever it does, the training is not disturbed: all it can do is tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from supervisor.decide import notices
from supervisor.decide.notices import Change, Means, Notice
from supervisor.draining import Draining
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.ledger import Ledger
from supervisor.model import Effect, NoticeWithdrawn
from supervisor.wording import duration

#: told which notices stand, whenever that may have changed
Standing = Callable[[tuple[Notice, ...]], None]


class Source(Protocol):
    """Whoever gives notice: one cloud. Implementations are ``launch``'s."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    async def watch(self, standing: Standing, say: Callable[[str], None]) -> None:
        """Until cancelled: tell which notices stand; ``say`` what keeps it from knowing, once."""
        ...

    async def acknowledge(self, notice: Notice) -> str | None:
        """The job has saved and left: the machine may be taken now. One line that says what came of it."""
        ...


class Answers(Protocol):
    """What a notice can bring about: ``Stopping``."""

    def hear(self, standing: tuple[Notice, ...]) -> None:
        """These notices stand: whoever they are for leaves in time for the nearest."""
        ...

    def heed(self, notice: Notice) -> None:
        """Whoever it is for leaves now."""
        ...

    def recall(self, notice: Notice, *, needless: bool) -> bool | None:
        """What it asked for is needless (the stop of the whole job only if ``needless``): whether it could be taken back; None: it asked
        for nothing.
        """
        ...

    def save(self) -> None:
        """Make a checkpoint soon, and go on."""
        ...


class Noticing:
    """The notices of one run, of all of its nodes. Used from the loop's thread only."""

    def __init__(self, answers: Answers, ledger: Ledger, console: Console) -> None:
        self._answers, self._ledger, self._console = answers, ledger, console
        self._said: dict[str | None, tuple[Notice, ...]] = {}  # by node, as it said them
        self._known: tuple[Notice, ...] = ()

    def standing(self, standing: tuple[Notice, ...], node: str | None = None) -> None:
        """These notices stand now of that ``node``; None: of this one, which is alone."""
        if self._said.get(node, ()) == standing:
            return
        self._said[node] = standing
        change = self._compare()
        if not change.news and not change.withdrawn:
            return
        for notice in change.news:
            self._ledger.add(notice.fact(clock.now()))
            self._console.say(_describe(notice, clock.now()))
        self._answers.hear(self._known)
        urgent = [notice for notice in self._known if notice.effect is Effect.STOP]
        for notice in change.withdrawn:
            self._withdrawn(notice, needless=not urgent)
        for notice in urgent:
            self._answers.heed(notice)
        if change.news and not urgent:
            self._answers.save()

    def left(self, node: str) -> None:
        """That node is gone, and what was to come over it with it."""
        if not self._said.pop(node, ()):
            return
        for notice in self._compare().withdrawn:
            self._ledger.add(NoticeWithdrawn(time=clock.now(), source=notice.source, key=notice.key))
        self._answers.hear(self._known)

    def _compare(self) -> Change:
        known = tuple(
            notices.of_node(notice, node) for node, standing in self._said.items() for notice in standing
        )
        change = notices.compare(self._known, known)
        self._known = known
        return change

    def _withdrawn(self, notice: Notice, *, needless: bool) -> None:
        recalled = self._answers.recall(notice, needless=needless)
        self._ledger.add(
            NoticeWithdrawn(
                time=clock.now(), source=notice.source, key=notice.key, too_late=recalled is False
            )
        )
        if recalled is None:
            said = ""
        elif recalled:
            said = "; the job goes on"
        elif notice.node is None:
            said = ", too late: the job has begun to stop; run it again"
        else:
            said = ", too late: what was begun for it is carried out"
        self._console.say(f"{notice.source}: over, or withdrawn{said}")


def means(ledger: Ledger, draining: Draining) -> Means:
    """What there is to save now, and what saving took so far."""
    record = ledger.record
    snapshot, saved = record.snapshot, record.checkpoint
    return Means(
        step=1 / record.rate if record.rate else None,
        copy=snapshot.seconds if snapshot is not None else None,
        drain=saved.seconds if saved is not None and saved.seconds else draining.seconds,
        under_way=draining.under_way,
        unsaved=draining.leaves_out_newest(),
    )


def _describe(notice: Notice, now: float) -> str:
    when = "" if notice.deadline is None else f", in {duration(max(0.0, notice.deadline - now))}"
    who = "the job" if notice.node is None else notice.node
    what = {
        Effect.WARN: "a checkpoint is made, and the job goes on",
        Effect.LEAVE: f"a checkpoint is made, and {who} stops in time",
        Effect.STOP: f"{who} stops",
    }
    return f"{notice.source}{when}: {what[notice.effect]}"
