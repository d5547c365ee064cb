"""The snapshots in this node's slots, as its peers may see them (``edge.peers``)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from supervisor.checkpoint.directory import SLOT_NAME, entry_status
from supervisor.checkpoint.manifest import Key, check_name
from supervisor.checkpoint.slots import read_slot
from supervisor.edge.peers.protocol import Listing
from supervisor.errors import CheckpointError


class SlotShelf:
    """Shows what the slots in ``folders`` hold whole at the moment. Safe for several threads."""

    def __init__(self, folders: Iterable[Path], key: Key | None = None) -> None:
        self._folders: Final = tuple(folders)
        self._key: Final = key
        self._known: dict[
            Path, Listing
        ] = {}  # as they were last seen: most looks find what the one before did

    def find(self, attempt: int, step: int) -> Listing | None:
        """A snapshot that is complete at this moment; damaged ones are as good as none."""
        for folder in self._folders:
            found = self._listing(folder)
            if found is not None and (found.attempt, found.step) == (attempt, step):
                return found
        return None

    def open(self, listing: Listing, name: str) -> int:
        """A descriptor of one of its files. Raises OSError, CheckpointError."""
        check_name(name)
        for folder in self._folders:
            if self._listing(folder) == listing:
                entry_status(folder, name)
                return os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        raise CheckpointError(f"{name}: its snapshot has gone")

    def _listing(self, folder: Path) -> Listing | None:
        try:
            text = (folder / SLOT_NAME).read_bytes().decode()
            known = self._known.get(folder)
            if known is not None and known.record == text:
                return known
            record = read_slot(folder, self._key)
            if record is None or (folder / SLOT_NAME).read_bytes().decode() != text:
                return None
        except (OSError, ValueError, CheckpointError):
            return None
        found = Listing(attempt=record.attempt, step=record.step, record=text, files=dict(record.files))
        self._known[folder] = found
        return found
