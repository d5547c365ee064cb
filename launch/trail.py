"""What a live view shows of the past: how each attempt ended, and the losses of the last while.

A journal of a month has hundreds of thousands of lines, nearly all of which a view of the present need not understand. So lines
are told apart by their first bytes, and of the many only the newest are decoded: that reads a hundred megabytes a second.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Final

from supervisor.edge import journal
from supervisor.errors import JobError
from supervisor.model import AttemptEnded, AttemptStarted, Fact, Progress, RunStarted

MOST_LOSSES: Final = 400


def _begins(kind: type[Fact]) -> bytes:
    return b'{"v":%d,"fact":"%s",' % (journal.VERSION, kind.__name__.encode())


_SELDOM: Final = tuple(map(_begins, (RunStarted, AttemptStarted, AttemptEnded)))
_OFTEN: Final = tuple(map(_begins, (Progress, AttemptEnded)))


class Trail:
    """``advance`` reads what is new."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[str, int] = {}  # bytes, by file
        #: attempt → running, finished, stopped, failed, cut off; in their order
        self.outcomes: dict[int, str] = {}
        self.losses: deque[float] = deque(maxlen=MOST_LOSSES)
        #: the options of the newest run, in words
        self.settings: dict[str, str] = {}

    def advance(self) -> None:
        """Raises JobError when the journal cannot be read."""
        often: deque[bytes] = deque(maxlen=MOST_LOSSES)
        try:
            for path in sorted(self._directory.glob("*.jsonl")):
                offset = self._read.get(path.name, 0)
                with path.open("rb") as file:
                    file.seek(offset)
                    for line in file:
                        if not line.endswith(b"\n"):
                            break
                        offset += len(line)
                        if line.startswith(_OFTEN):
                            often.append(line)
                        if line.startswith(_SELDOM):
                            self._note(_decoded(line))
                self._read[path.name] = offset
        except OSError as error:
            where = error.filename or self._directory
            raise JobError(f"cannot read the journal {where}: {error.strerror}") from None
        for line in often:
            self._note_loss(_decoded(line))

    def _note(self, fact: Fact | None) -> None:
        match fact:
            case RunStarted():
                self.settings = fact.settings
                self._end_last("cut off")
            case AttemptStarted():
                self._end_last("cut off")
                self.outcomes[fact.attempt] = "running"
            case AttemptEnded():
                failed = "failed" if fact.failure is not None else "stopped"
                self.outcomes[fact.attempt] = "finished" if fact.finished else failed

    def _note_loss(self, fact: Fact | None) -> None:
        match fact:
            case Progress(metrics={"loss": loss}) | AttemptEnded(metrics={"loss": loss}) if math.isfinite(
                loss
            ):
                self.losses.append(loss)

    def _end_last(self, outcome: str) -> None:
        """An attempt that had not ended died with its supervisor."""
        last = next(reversed(self.outcomes), None)
        if last is not None and self.outcomes[last] == "running":
            self.outcomes[last] = outcome


def _decoded(line: bytes) -> Fact | None:
    try:
        return journal.decode(line)
    except ValueError:
        return None  # the status says so
