"""Where a job on several nodes puts its checkpoints together: the checkpoints' place, and the refuge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from supervisor.checkpoint.in_parts import PartStorage
from supervisor.checkpoint.location import Location
from supervisor.checkpoint.manifest import Key
from supervisor.checkpoint.storage import CheckpointStorage, LocalStorage, Owner, open_storage
from supervisor.config import Options
from supervisor.edge.jobdir import JobDirectory


@dataclass(frozen=True)
class PartPlaces:
    """The same on all nodes. ``emergency`` is the job directory, which all of them see."""

    storage: CheckpointStorage
    emergency: LocalStorage

    @classmethod
    def asked_for(cls, options: Options, job: JobDirectory, key: Key | None) -> PartPlaces:
        """As the options have it. Raises ConfigError."""
        where: Location = options.checkpoints_directory
        if isinstance(where, Path):
            where = where.absolute()
        storage = open_storage(where, key, timeout=options.storage_timeout)
        return cls(storage, LocalStorage(job.path / "checkpoints", key))

    def of(self, owner: Owner, *, emergency: bool) -> PartStorage:
        """Where one checkpoint is put together."""
        return (self.emergency if emergency else self.storage).parts(owner)
