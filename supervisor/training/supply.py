"""What this rank reads of a checkpoint that is fetched and compared on demand (``checkpoint/on_demand``): it is asked for first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from supervisor.checkpoint.pieces import SMALLEST, Range, merged, without

#: returns when these ranges, by the file's name, can be read; raises CheckpointError, StorageError
Need = Callable[[Mapping[str, list[Range]]], None]


class Supply:
    """Of one directory; what was asked for once is there for good. Without a ``need``, all of it is there from the start."""

    grid = SMALLEST  # bytes; what is asked for is whole squares of it

    def __init__(self, directory: Path, need: Need | None) -> None:
        self._directory, self._need = directory, need
        self._there: dict[str, list[Range]] = {}

    def bring(self, wanted: Iterable[tuple[str, int, int]]) -> None:
        """Have these ranges there: file, offset, bytes. Raises CheckpointError, StorageError, OSError."""
        if self._need is None:
            return
        by_name: dict[str, list[Range]] = defaultdict(list)
        for name, offset, size in wanted:
            by_name[name].append((offset, size))
        missing: dict[str, list[Range]] = {}
        there: dict[str, list[Range]] = {}
        for name, ranges in by_name.items():
            size, known = (self._directory / name).lstat().st_size, self._there.get(name, [])
            squares = merged(ranges, size, self.grid)
            if new := without(squares, known):
                missing[name], there[name] = new, merged([*known, *new], size, self.grid)
        if missing:
            self._need(missing)
            self._there |= there
