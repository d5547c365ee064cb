"""A checkpoint of which only that is read what somebody needs: on a job of several nodes, the parts of a node's own ranks.

Nobody compares all of it before. Instead every piece in which a needed byte lies is compared with the manifest before its reader is
told that it may go on, so no wrong byte is ever loaded, and each node fetches, keeps and hashes its own share alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from supervisor.checkpoint.manifest import METADATA_NAME, Manifest
from supervisor.checkpoint.pieces import Piece, Range
from supervisor.errors import CancelledError, CheckpointError, EverstepError

#: have these pieces at hand and compared, unless told to stop; raises CheckpointError, StorageError (CancelledError)
Obtain = Callable[[Sequence[Piece], Callable[[], bool]], None]


class OnDemand:
    """The checkpoint of ``manifest``, to be read in the directory ``path`` where it was asked for. Safe for several threads.

    The index is there from the start, unless that is ``cancelled``. Raises CheckpointError, StorageError.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        obtain: Obtain,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.path = path
        self._files, self._obtain = manifest.files, obtain
        self._there: set[tuple[str, int]] = set()
        self._lock = threading.Lock()  # what several ranks need is obtained once
        self._over = threading.Event()
        self._failure: EverstepError | None = None
        self.bytes, self.total = 0, manifest.bytes  # that are there, and of all files
        self._bring(self._files[METADATA_NAME].cut(METADATA_NAME), cancelled)

    def need(self, wanted: Mapping[str, Iterable[Range]]) -> None:
        """Return when these ranges of these files can be read, and are as the manifest says.

        Raises CheckpointError when one is not, StorageError when storage does not give it (CancelledError after ``close``);
        from then on at once, whatever is asked for: this node cannot go on from here.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                pieces = [p for name, ranges in wanted.items() for p in self._touched(name, list(ranges))]
                self._bring([p for p in pieces if (p.name, p.start) not in self._there], self._over.is_set)
            except EverstepError as error:
                self._failure = error
                raise

    def _bring(self, pieces: Sequence[Piece], over: Callable[[], bool]) -> None:
        if not pieces:
            return
        if over():
            raise CancelledError(f"reading {self.path} was given up")
        self._obtain(pieces, over)
        self._there |= {(piece.name, piece.start) for piece in pieces}
        self.bytes += sum(piece.length for piece in pieces)

    def _touched(self, name: str, ranges: Sequence[Range]) -> list[Piece]:
        entry = self._files.get(name)
        if entry is None:
            raise CheckpointError(f"{name} is not among the files of the checkpoint")
        if any(start < 0 or start + length > entry.bytes for start, length in ranges):
            raise CheckpointError(f"{name} has only {entry.bytes} bytes")
        return [piece for piece in entry.cut(name) if any(_meet(piece, one) for one in ranges)]

    def close(self) -> None:
        """Nobody reads any more: obtain nothing."""
        self._over.set()


def _meet(piece: Piece, wanted: Range) -> bool:
    start, length = wanted
    return start < piece.start + piece.length and piece.start < start + length
