"""What a node that follows resumes from: the state that the leader has chosen, as it lies on this node."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from supervisor.checkpoint.manifest import Key, fingerprint
from supervisor.checkpoint.storage import CheckpointStorage, LocalStorage, open_storage
from supervisor.config import Options
from supervisor.edge.jobdir import JobDirectory
from supervisor.edge.threads import in_thread
from supervisor.errors import CheckpointError, StorageError
from supervisor.fleet import Origin
from supervisor.model import Tier
from supervisor.peer_copies import PeerCopies
from supervisor.resume import Resume
from supervisor.shared_snapshots import SharedSnapshots
from supervisor.staging import Staging


class Finder:
    """Of one node."""

    def __init__(
        self,
        options: Options,
        job: JobDirectory,
        key: Key | None,
        snapshots: SharedSnapshots,
        staging: Staging,
        copies: PeerCopies,
    ) -> None:
        self._options, self._job, self._key = options, job, key
        self._snapshots, self._staging, self._copies = snapshots, staging, copies

    async def find(self, origin: Origin, rank: int, nodes: int) -> Resume:
        """As this node, the ``rank``-th of ``nodes``, has it. Raises CheckpointError, StorageError, PeerError."""
        if origin.tier is None:
            self._snapshots.drop_all()
            return Resume()
        if origin.tier is Tier.RAM:
            age, holders = (origin.source, origin.step), origin.holders
            if holders and holders[0].nodes != nodes:
                await self._copies.assemble(age, holders)
                return Resume(
                    step=origin.step, tier=Tier.RAM, path=self._copies.assembled, kept=self._copies.assembled
                )
            if holders:
                folder = await self._copies.bring_part(age, rank, nodes, holders, origin.slot)
                return Resume(step=origin.step, tier=Tier.RAM, path=folder, kept=folder)
            if not self._snapshots.move(age, origin.slot):
                raise CheckpointError(f"the snapshot of step {origin.step} is not on this node any more")
            folder = self._snapshots.folder(origin.slot)
            return Resume(step=origin.step, tier=Tier.RAM, path=folder, kept=folder)
        self._snapshots.drop_all()
        over = threading.Event()
        try:
            return await in_thread(lambda: self._checkpoint(origin, nodes, over.is_set))
        finally:
            over.set()

    def _checkpoint(
        self, origin: Origin, nodes: int, cancelled: Callable[[], bool] = lambda: False
    ) -> Resume:
        name, options = Path(origin.path or "").name, self._options
        place: CheckpointStorage = LocalStorage(self._job.path / "checkpoints", self._key)
        if not origin.emergency:
            place = open_storage(options.checkpoints_directory, self._key, timeout=options.storage_timeout)
        record = place.find(name)
        if record is None:
            raise StorageError(
                f"{name}, from which the leader resumes, is not seen in {place.where} on this node: is that shared?"
            )
        if record.manifest is None or fingerprint(record.manifest) != origin.fingerprint:
            raise StorageError(
                f"{record.path} is not on this node what it is on the leader's ({record.problem or 'another checkpoint'})"
            )
        found = self._staging.on_demand(place, record, nodes, cancelled)
        return Resume(
            origin.step, Tier.CHECKPOINT, found.path, record.path, origin.fingerprint, on_demand=found
        )
