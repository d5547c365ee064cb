"""The journal and the record folded from it, kept in step: the only way a fact enters the supervisor."""

from __future__ import annotations

from supervisor.decide import lifecycle
from supervisor.edge.journal import Journal
from supervisor.model import Fact, JobRecord


class Ledger:
    """``add`` writes a fact down, then folds it; ``record`` is the job as it stands."""

    def __init__(self, journal: Journal, record: JobRecord) -> None:
        self._journal = journal
        self.record = record

    def add(self, fact: Fact) -> None:
        """Raises the lifecycle's error for a fact that cannot happen now (a bug of ours)."""
        self.record = lifecycle.apply(self.record, fact)
        self._journal.append(fact)

    def close(self) -> None:
        """Wait for what was written to be on storage."""
        self._journal.close()
