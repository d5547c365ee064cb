"""Keeps ``live.json`` true while an attempt makes steps: by the supervisor that leads the job, or is alone.

Written in a thread, one at a time, so a file system that hangs or is full holds up nothing; what fails is said once, until it works again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from supervisor import background, shares
from supervisor.attempt import Attempt
from supervisor.decide import straggler
from supervisor.edge import clock, live_file
from supervisor.edge.live import Live, of_pages
from supervisor.edge.live_file import Told
from supervisor.edge.threads import in_thread

PERIOD: Final = 2.0  # seconds between two writings, at least
RANKS: Final = 2000  # … or as many as make so many ranks a second
AGAIN: Final = 10.0  # seconds after which it is written though nothing has changed, as the journal is
LAST: Final = 1.0  # seconds for what is written, or removed, in the end


class LiveView:
    """Used by the node from the loop's thread; ``newest`` by any."""

    def __init__(self, job: Path, run_id: str, epoch: int, say: Callable[[str], None]) -> None:
        self._job, self._run_id, self._epoch, self._say = job, run_id, epoch, say
        self._looked = self._wrote = 0.0
        self._writing: asyncio.Task[None] | None = None
        self._told: Told | None = None
        self._refused = False
        #: what is known of all ranks of an attempt, by its number; at most some seconds old
        self.newest: tuple[int, Live] | None = None

    def look(self, attempt: Attempt) -> None:
        """By the clock, once every rank has made a step."""
        now = clock.monotonic()
        if now - self._looked < max(PERIOD, (attempt.world_size or 0) / RANKS):
            return
        self._looked = now
        if (live := seen(attempt)) is None:
            return
        self.newest = attempt.number, live
        told = self._as_told(attempt, live)
        is_new = self._told is None or told != replace(self._told, written=told.written)
        if self._writing is None and (is_new or now - self._wrote >= AGAIN):
            self._told, self._wrote = told, now
            self._writing = background.start(self._write(told))

    async def close(self) -> None:
        """The job is over, or goes on without this supervisor."""
        with contextlib.suppress(OSError, TimeoutError):
            if self._writing is not None:
                await asyncio.wait_for(asyncio.shield(self._writing), LAST)
            await asyncio.wait_for(in_thread(partial(live_file.remove, self._job)), LAST)

    async def _write(self, told: Told) -> None:
        try:
            await in_thread(partial(live_file.write, self._job, told))
        except OSError as error:
            if not self._refused:
                self._say(
                    f"{self._job / live_file.NAME}: {error.strerror or error}; other hosts see what the journal says"
                )
            self._refused = True
        else:
            self._refused = False
        finally:
            self._writing = None

    def _as_told(self, attempt: Attempt, live: Live) -> Told:
        known = [live.own_shares.get(rank) for rank in range(live.ranks)]
        return Told(
            format=live_file.FORMAT, run_id=self._run_id, epoch=self._epoch, attempt=attempt.number, written=clock.now(),
            step=live.step, total_steps=live.total_steps, saved_step=live.saved_step, saved_time=live.saved_time,
            loss=live.loss, world_size=live.ranks, own_shares=straggler.percents(known), nodes=live.nodes,
        )  # fmt: skip


def seen(attempt: Attempt) -> Live | None:
    """What the supervisor that leads knows of all ranks; None while nobody is there. Which snapshot is whole on several nodes the journal says."""
    live = of_pages([attempt.seats[rank].page for rank in sorted(attempt.seats)])
    if live is None:
        return None
    live = replace(
        live, step=min(attempt.steps), own_shares=shares.everywhere(attempt), ranks=attempt.world_size or live.ranks,
        nodes=shares.nodes(attempt),
    )  # fmt: skip
    return replace(live, saved_step=None, saved_time=None) if live.nodes else live
