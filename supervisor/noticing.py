"""Notices during a run: what a source says is journalled, said, and answered (what each asks for: ``decide/notices.py``).

A source is a stranger's server on the network. Whatever it does, the training is not disturbed: all it can do is tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from supervisor.decide import notices
from supervisor.decide.notices import Means, Notice
from supervisor.draining import Draining
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.ledger import Ledger
from supervisor.model import Effect, NoticeWithdrawn
from supervisor.wording import duration

ACKNOWLEDGE: Final = 5.0  # seconds that an acknowledgement may take, at the very end of the run

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
        """These notices stand: the job leaves in time for the nearest."""
        ...

    def heed(self, notice: Notice) -> None:
        """Stop now."""
        ...

    def recall(self, source: str) -> bool | None:
        """The stop that ``source`` asked for is needless: whether it could be taken back; None: there is none."""
        ...

    def save(self) -> None:
        """Make a checkpoint soon, and go on."""
        ...


class Noticing:
    """The notices of one run. Used from the loop's thread only."""

    def __init__(self, source: Source | None, answers: Answers, ledger: Ledger, console: Console) -> None:
        self._source, self._answers, self._ledger, self._console = source, answers, ledger, console
        self._known: tuple[Notice, ...] = ()
        self._began = clock.now()

    async def watch(self) -> None:
        """Until cancelled."""
        if self._source is not None:
            await self._source.watch(self.standing, self._console.say)

    def standing(self, standing: tuple[Notice, ...]) -> None:
        """These notices stand now."""
        standing = tuple(notices.as_of(notice, self._began) for notice in standing)
        change = notices.compare(self._known, standing)
        self._known = standing
        if not change.news and not change.withdrawn:
            return
        for notice in change.news:
            self._ledger.add(notice.fact(clock.now()))
            self._console.say(_describe(notice, clock.now()))
        self._answers.hear(standing)
        urgent = notices.urgent(standing)
        for notice in change.withdrawn:
            self._withdrawn(notice, needless=urgent is None)
        if urgent is not None:
            self._answers.heed(urgent)
        elif change.news:
            self._answers.save()

    def _withdrawn(self, notice: Notice, *, needless: bool) -> None:
        recalled = self._answers.recall(notice.source) if needless else None
        self._ledger.add(
            NoticeWithdrawn(
                time=clock.now(), source=notice.source, key=notice.key, too_late=recalled is False
            )
        )
        if recalled is None:
            said = ""
        elif recalled:
            said = "; the job goes on"
        else:
            said = ", too late: the job has begun to stop; run it again"
        self._console.say(f"{notice.source}: over, or withdrawn{said}")

    async def acknowledge(self) -> None:
        """Tell the source that nothing needs the machine any more."""
        if self._source is None:
            return
        for notice in self._known:
            if notice.effect is Effect.WARN:
                continue
            try:
                async with asyncio.timeout(ACKNOWLEDGE):
                    said = await self._source.acknowledge(notice)
            except TimeoutError:
                said = f"{self._source.name} did not take the acknowledgement in time"
            if said:
                self._console.say(said)


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
    what = {
        Effect.WARN: "a checkpoint is made, and the job goes on",
        Effect.LEAVE: "a checkpoint is made, and the job stops in time",
        Effect.STOP: "the job stops",
    }
    return f"{notice.source}{when}: {what[notice.effect]}"
