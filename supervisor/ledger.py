"""The journal and the record folded from it, kept in step: the only way a fact enters the supervisor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from supervisor import replay
from supervisor.edge.journal import Journal
from supervisor.model import Fact
from supervisor.record import JobRecord
from supervisor.replay import Replay

SAVE_EVERY: Final = (
    2000  # facts: a successor folds at most so many (about 50 ms), and then those since its start
)


class Ledger:
    """``add`` folds a fact and writes it down; ``record`` is the job as it stands."""

    def __init__(self, journal: Journal, folded: Replay) -> None:
        self._journal = journal
        self._folded = folded
        self._listeners: list[Callable[[Fact], None]] = []
        self._silenced = False
        #: whether the story of the job is still this supervisor's to tell; asked before each fact
        self.is_ours: Callable[[], bool] = lambda: True

    @property
    def record(self) -> JobRecord:
        """The job as it stands."""
        return self._folded.record

    def listen(self, heard: Callable[[Fact], None]) -> None:
        """Have ``heard`` called with every fact that is added from now on, once it is folded and written down."""
        self._listeners.append(heard)

    def add(self, fact: Fact) -> None:
        """Raises the lifecycle's error for a fact that cannot happen now (a bug of ours)."""
        if self._silenced or not self.is_ours():
            self._silenced = True
            return
        self._folded.add(fact)
        self._folded.wrote(self._journal.path.name, fact, self._journal.append(fact))
        if self._folded.unsaved >= SAVE_EVERY:
            self._save()
        for heard in self._listeners:
            heard(fact)

    def silence(self) -> None:
        """Another supervisor tells the story of the job from here on: nothing is added any more."""
        self._silenced = True

    def close(self) -> None:
        """Wait for what was written to be on storage."""
        if self._folded.unsaved and not self._silenced:
            self._save()
        self._journal.close()

    def _save(self) -> None:
        content = self._folded.to_save(self._journal.path.name, self._journal.size)
        if content is not None:
            self._journal.put_beside(replay.FILE, content)
