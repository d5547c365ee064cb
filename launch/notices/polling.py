"""Looking at a source again and again, at its own pace, and slower while it fails. What fails is said once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from launch.notices.metadata import MetadataError
from supervisor.decide.notices import Notice
from supervisor.noticing import Standing

SAID_AFTER: Final = 3  # failures in a row: one or two mean nothing
LONGEST_WAIT: Final = 10.0  # seconds: some notices come half a minute ahead
LONGEST_ASKED: Final = 60.0  # … where the service asks for more patience (429, 503)


@dataclass(frozen=True)
class Look:
    """The notices that stand, as far as is known, and what kept the source from knowing more."""

    notices: tuple[Notice, ...]
    problem: MetadataError | None = None


class Trouble:
    """Failures in a row of one source: how long to wait, and whether that must be said."""

    def __init__(self, name: str, say: Callable[[str], None], hint: Callable[[MetadataError], str]) -> None:
        self._name, self._say, self._hint = name, say, hint
        self._failures = 0

    def over(self) -> None:
        """It has answered."""
        if self._failures >= SAID_AFTER:
            self._say(f"{self._name}: notices are seen again")
        self._failures = 0

    def failed(self, problem: MetadataError) -> float:
        """Seconds to wait."""
        self._failures += 1
        if self._failures == SAID_AFTER:
            hint = self._hint(problem)
            self._say(
                f"{self._name}: notices cannot be seen ({problem}){f'; {hint}' if hint else ''}; asking on"
            )
        wait = min(LONGEST_WAIT, 0.5 * 2.0 ** min(self._failures, 10))
        return max(wait, min(LONGEST_ASKED, problem.retry_after))


async def poll(
    look: Callable[[], Awaitable[Look]], period: float, standing: Standing, trouble: Trouble
) -> None:
    """Until cancelled: ``look`` every ``period`` seconds and tell ``standing``."""
    while True:
        seen = await look()
        standing(seen.notices)
        if seen.problem is None:
            trouble.over()
            await asyncio.sleep(period)
        else:
            await asyncio.sleep(max(period, trouble.failed(seen.problem)))
