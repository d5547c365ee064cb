"""The snapshots in this node's slots, as its peers may see them (``edge.peers``)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.checkpoint.manifest import Key, check_name
from supervisor.checkpoint.slots import read_slot
from supervisor.edge.peers.protocol import Listing, Part
from supervisor.errors import CheckpointError

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class SlotShelf:
    """Shows what the slots in ``folders`` hold whole at the moment. Safe for several threads."""

    def __init__(self, folders: Iterable[Path], key: Key | None = None) -> None:
        self._folders: Final = tuple(folders)
        self._key: Final = key
        #: as they were last seen: most looks find what the one before did
        self._known: dict[Path, Listing] = {}

    def find(self, attempt: int, step: int, part: Part | None = None) -> Listing | None:
        """A snapshot, or a node's part of it, that is complete at this moment; damaged ones are as good as none."""
        for folder in self._folders:
            found = self._listing(folder)
            if found is None or (found.attempt, found.step) != (attempt, step):
                continue
            if part is None:
                return replace(found, part=None)
            if found.part == part:
                return found
        return None

    def open(self, listing: Listing, name: str) -> int:
        """A descriptor of one of its files. Raises OSError, CheckpointError."""
        check_name(name)
        for folder in self._folders:
            try:
                slot = os.open(folder, _FOLDER)
            except FileNotFoundError:
                continue
            try:  # from here on it is this directory, whatever it may be called meanwhile: slots change places
                if _text(slot) == listing.record:
                    return _opened(slot, name)
            finally:
                os.close(slot)
        raise CheckpointError(f"{name}: its snapshot has gone")

    def _listing(self, folder: Path) -> Listing | None:
        try:
            text = (folder / SLOT_NAME).read_text()
            known = self._known.get(folder)
            if known is not None and known.record == text:
                return known
            record = read_slot(folder, self._key)
            if record is None or (folder / SLOT_NAME).read_text() != text:
                return None
        except (OSError, ValueError, CheckpointError):
            return None
        found = Listing(
            attempt=record.attempt, step=record.step, record=text, files=dict(record.files),
            part=(record.node_rank, record.nodes),
        )  # fmt: skip
        self._known[folder] = found
        return found


def _text(slot: int) -> str | None:
    try:
        fd = os.open(SLOT_NAME, _FILE, dir_fd=slot)
    except FileNotFoundError:
        return None
    with open(fd, encoding="utf-8") as file:
        return file.read()


def _opened(slot: int, name: str) -> int:
    """Below the directory, and behind no symbolic link."""
    first, _, rest = name.partition("/")
    if not rest:
        fd = os.open(first, _FILE, dir_fd=slot)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise CheckpointError(f"{name}: is not a regular file")
    folder = os.open(first, _FOLDER | os.O_NOFOLLOW, dir_fd=slot)
    try:
        return _opened(folder, rest)
    finally:
        os.close(folder)
