"""What lies in the way of a drain, and how the drain may fail without having made anything worse.

A good checkpoint of the step that the same run has made is kept: there is nothing to do. A leftover is removed. All else is renamed aside,
whole, for the new checkpoint to be written in its place. When that is committed, what was aside is removed if it was
damaged for certain, and stays if it was not ours to judge (no manifest, another run's or key, a newer version,
unreadable now). When the drain fails, what was aside is put back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from supervisor.checkpoint.directory import discard, is_leftover, sync_directory
from supervisor.checkpoint.manifest import MANIFEST_NAME, ForeignError, Key, Manifest, Origin
from supervisor.checkpoint.verify import UnreadableError, verify_directory
from supervisor.edge.files import Files
from supervisor.errors import CheckpointError, StorageError


def good_checkpoint(directory: Path, origin: Origin, key: Key | None, files: Files) -> Manifest | None:
    """The manifest of ``directory`` if it is a checkpoint of that step and run of which every byte was checked."""
    try:
        manifest = verify_directory(directory, key, files=files)
    except CheckpointError:
        return None
    is_ours = (manifest.step, manifest.origin.run_id) == (origin.step, origin.run_id)
    return manifest if is_ours else None


class Displaced:
    """Around the writing of ``destination``: clears it, and afterwards cleans up after success or failure."""

    def __init__(self, destination: Path, key: Key | None, fence: Callable[[], None], files: Files) -> None:
        self._destination = destination
        self._key = key
        self._fence = fence
        self._files = files
        self._aside: Path | None = None
        self._expendable = False

    def __enter__(self) -> None:
        if not os.path.lexists(self._destination):
            return
        if is_leftover(self._destination):
            discard(self._destination, files=self._files)
            return
        self._expendable = _is_damaged(self._destination, self._key, self._files)
        aside = _free_name(self._destination)
        try:
            self._rename(self._destination, aside)
        except OSError:
            with contextlib.suppress(OSError):  # where only the sync failed
                self._files.rename(aside, self._destination)
            raise
        self._aside = aside

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if self._aside is not None and self._expendable:
                    discard(self._aside, files=self._files)
                return
            self._fence()  # else what is there may be the newer epoch's
            if os.path.lexists(self._destination):
                discard(self._destination, files=self._files)
            if self._aside is not None:
                self._rename(self._aside, self._destination)
        except (OSError, StorageError):
            # Storage that fails even now: what is left is marked, and swept later. The first error matters more.
            return

    def _rename(self, source: Path, target: Path) -> None:
        self._files.rename(source, target)
        sync_directory(target.parent, files=self._files)


def _is_damaged(directory: Path, key: Key | None, files: Files) -> bool:
    """Damaged for certain: it has a manifest, which is ours to judge, and is not what that says."""
    try:
        verify_directory(directory, key, files=files)
    except (ForeignError, UnreadableError):
        return False
    except CheckpointError:
        return not directory.is_symlink() and (directory / MANIFEST_NAME).is_file()
    return False


def _free_name(directory: Path) -> Path:
    number = 1
    while os.path.lexists(aside := directory.with_name(f"{directory.name}.aside-{number}")):
        number += 1
    return aside
