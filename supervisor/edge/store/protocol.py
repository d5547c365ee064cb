"""The store: a few keys that all nodes of a job see, each change with a number, and leases that die with their holder.

What every store promises (``tests/store/test_contract.py`` holds all of them to it):

- *One order.* Each change of any key gets the next *revision*. Whoever has seen revision R and asks what has changed since
  gets all of it, deletions too, or the whole directory where the store does not remember that far back.
- *Compare and set.* A change that names the revision it expects happens only if the key still has it (0: is not there).
- *Leases.* A key put under a lease is removed when the lease has not been renewed for as long as it was granted for. Time is
  the store's: no clocks are compared.
- *Deadlines.* No call waits for ever. One that gets no answer raises StoreError, and then it is not known whether it
  happened: read, or expect a revision.

Keys are ``directory/name``; a *directory* is asked for with its slash. Values are text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

ANSWER: Final = 5.0  # seconds that a store may take to answer
LONGEST_VALUE: Final = 8 << 20  # bytes


@dataclass(frozen=True)
class Entry:
    """A value, and the revision of its last change."""

    value: str
    revision: int


@dataclass(frozen=True, kw_only=True)
class View:
    """What is in a directory (``whole``), or what has changed in it, as of ``revision``."""

    revision: int
    whole: bool
    entries: Mapping[str, Entry] = field(default_factory=dict)  # by key
    gone: frozenset[str] = frozenset()  # keys that were removed; only where it is not whole

    @property
    def is_empty(self) -> bool:
        """Whether nothing has changed."""
        return not (self.whole or self.entries or self.gone)


class Store(Protocol):
    """See the module. Every method may raise StoreError."""

    async def read(self, directory: str) -> View:
        """All that is in a directory."""
        ...

    async def changes(self, directory: str, since: int, patience: float) -> View:
        """What has changed after revision ``since``; waits up to ``patience`` seconds for something to, then is empty."""
        ...

    async def put(
        self, key: str, value: str | None, *, expected: int | None = None, lease: int | None = None
    ) -> int | None:
        """Set a key (None: remove it); the new revision, or None where its revision is not the ``expected`` one.

        Raises LeaseLostError when there is no such lease (any more).
        """
        ...

    async def grant(self, seconds: float) -> int:
        """A new lease; its number."""
        ...

    async def renew(self, lease: int) -> bool:
        """Keep a lease for as long again; False where it has run out."""
        ...

    async def close(self) -> None:
        """Let go of connections. Leases run out by themselves."""
        ...


def directory_of(key: str) -> str:
    """The directory that a key is in. Raises ValueError for what is no key."""
    directory, slash, name = key.rpartition("/")
    if not slash or not name or not directory:
        raise ValueError(f"{key!r} is no key: directory/name is required")
    return directory + slash
