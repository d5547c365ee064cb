"""The store's contents in memory: what ``tcp://`` serves, and all of the fake. No I/O, and ``now`` is an argument.

Every directory remembers its last changes, so that thousands of nodes that each ask for what is new cost what is new, not what
there is. Revisions begin at a number given, which a server derives from the time: one that was started anew does not seem to be an
earlier self, and whoever asks it for changes since then gets the whole.
"""

from __future__ import annotations

import heapq
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from supervisor.edge.store.protocol import Entry, View, directory_of
from supervisor.errors import LeaseLostError

REMEMBERED: Final = 65536  # changes of a directory
LATE: Final = 1.0  # seconds between two looks at the leases that are more than a busy machine


@dataclass
class _Directory:
    entries: dict[str, Entry] = field(default_factory=dict)
    changes: deque[tuple[int, str]] = field(default_factory=deque)
    forgotten: int = 0  # changes up to this revision are not remembered


@dataclass
class _Lease:
    seconds: float
    until: float
    keys: set[str] = field(default_factory=set)


class Table:
    """Directories, entries, leases."""

    def __init__(self, revision: int) -> None:
        self.revision = self._first = revision
        self._directories: dict[str, _Directory] = {}
        self._leases: dict[int, _Lease] = {}
        self._lease_of: dict[str, int] = {}
        self._due: list[tuple[float, int]] = []  # a heap; times may have been put off since
        self._looked: float | None = None

    def read(self, directory: str) -> View:
        """All that is in a directory."""
        there = self._directories.get(directory)
        return View(revision=self.revision, whole=True, entries=dict(there.entries) if there else {})

    def changes(self, directory: str, since: int) -> View:
        """What has changed after ``since``; empty when nothing has."""
        there = self._directories.get(directory)
        if since > self.revision or since < (there.forgotten if there else self._first):
            return self.read(directory)
        entries: dict[str, Entry] = {}
        gone: set[str] = set()
        if there is not None:
            for revision, key in reversed(there.changes):
                if revision <= since:
                    break
                if key in there.entries:
                    entries[key] = there.entries[key]
                else:
                    gone.add(key)
        return View(revision=self.revision, whole=False, entries=entries, gone=frozenset(gone))

    def put(self, key: str, value: str | None, expected: int | None, lease: int | None) -> int | None:
        """As the protocol says."""
        directory = self._directories.setdefault(directory_of(key), _Directory(forgotten=self._first))
        there = directory.entries.get(key)
        if expected is not None and (there.revision if there else 0) != expected:
            return None
        if lease is not None and lease not in self._leases:
            raise LeaseLostError(f"there is no lease {lease} (any more)")
        if (old := self._lease_of.pop(key, None)) is not None and old in self._leases:
            self._leases[old].keys.discard(key)
        if value is None and there is None:
            return self.revision
        self.revision += 1
        if value is None:
            del directory.entries[key]
        else:
            directory.entries[key] = Entry(value, self.revision)
            if lease is not None:
                self._lease_of[key] = lease
                self._leases[lease].keys.add(key)
        directory.changes.append((self.revision, key))
        if len(directory.changes) > REMEMBERED:
            directory.forgotten, _ = directory.changes.popleft()
        return self.revision

    def grant(self, seconds: float, now: float) -> int:
        """A new lease."""
        number = secrets.randbits(62) | 1
        self._leases[number] = _Lease(seconds, now + seconds)
        heapq.heappush(self._due, (now + seconds, number))
        return number

    def renew(self, lease: int, now: float) -> bool:
        """Whether there was such a lease."""
        there = self._leases.get(lease)
        if there is not None:
            there.until = now + there.seconds
        return there is not None

    def expire(self, now: float) -> list[str]:
        """Remove what was under leases that have run out by ``now``; the keys.

        Nobody could renew while the process was stopped (a paused machine): such a gap between two calls is added to every lease.
        """
        gap = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        if gap > LATE:
            for lease in self._leases.values():
                lease.until += gap
        removed: list[str] = []
        while self._due and self._due[0][0] <= now:
            _, number = heapq.heappop(self._due)
            lease = self._leases[number]
            if lease.until > now:
                heapq.heappush(self._due, (lease.until, number))
                continue
            for key in sorted(lease.keys):
                self.put(key, None, None, None)
                removed.append(key)
            del self._leases[number]
        return removed

    @property
    def next_expiry(self) -> float | None:
        """When to call ``expire`` at the latest; None: there is no lease."""
        return self._due[0][0] if self._due else None
