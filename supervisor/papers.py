"""The order as it lies in the store: every node is sent each change of it, so what seldom changes is not in it.

What names all nodes of an attempt (``PARTS``) has a key of its own, and the order names its revision. The leader writes the parts first, so who
sees an order has been sent its parts, or is being sent them: until then it knows the order before. Every write expects the revision that its
writer has seen, the parts' too: a leader that leads no more writes over nothing of the next one's.
"""

from __future__ import annotations

import base64
import contextlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from supervisor.edge import plain
from supervisor.edge.store.protocol import Entry, Store, View
from supervisor.fleet import JOB, LEADER, ORDER, PARTS, Assignment, Order, Origin, Report

_KINDS: Final[dict[str, type[Assignment] | type[Origin]]] = {
    "run": Assignment,
    "standby": Assignment,
    "origin": Origin,
}
assert tuple(_KINDS) == PARTS
LONG: Final = 16 << 10  # characters of a part that is worth packing


class Papers:
    """One node's."""

    def __init__(self) -> None:
        self.revision = 0  # of the order that was read or written last
        self._entries: dict[str, Entry] = {}  # of the directory, as last seen
        self._read: dict[str, tuple[int, Any]] = {}  # parts, with the revision that they are of

    def take(self, view: View) -> Order | None:
        """What has changed in the store: the order, if that has, and can be read."""
        if view.whole:
            self._entries = dict(view.entries)
        for key, entry in view.entries.items():
            if key not in self._entries or entry.revision > self._entries[key].revision:
                self._entries[key] = entry
        for key in view.gone:
            self._entries.pop(key, None)
        there = self._entries.get(ORDER)
        if there is None and view.whole:
            self.revision = 0
        if there is None or there.revision == self.revision:
            return None
        with contextlib.suppress(ValueError, TypeError, KeyError):  # of a newer everstep: as good as none
            order = self._order(there)
            self.revision = there.revision
            return order
        return None

    def _order(self, entry: Entry) -> Order:
        """Raises KeyError where a part is still to come."""
        written = json.loads(entry.value)
        parts = {str(name): int(revision) for name, revision in written.pop("parts", {}).items()}
        found = {name: self._part(name, revision) for name, revision in parts.items()}
        return _with(plain.from_plain(Order, written), found)

    def _part(self, name: str, revision: int) -> Any:
        known = self._read.get(name)
        if known is not None and known[0] == revision:
            return known[1]
        entry = self._entries[_key(name)]
        if entry.revision != revision:
            raise KeyError(name)
        part = plain.from_plain(_KINDS[name], json.loads(unpacked(entry.value)))
        self._read[name] = (revision, part)
        return part

    async def put(self, store: Store, order: Order, leader: str) -> bool:
        """Write it in the place of the one that was last seen; False where another one is there. Raises StoreError."""
        parts = {}
        for name in PARTS:
            part = getattr(order, name)
            if part is not None:
                revision = await self._put_part(store, name, part, leader)
                if revision is None:
                    return False
                parts[name] = revision
        small = _with(order, dict.fromkeys(PARTS))
        text = json.dumps({**plain.to_sparse(small), "parts": parts}, allow_nan=False, separators=(",", ":"))
        written = await store.put(ORDER, text, expected=self.revision)
        if written is None:
            there = (await store.read(JOB)).entries.get(ORDER)
            if there is None or f'"leader":"{leader}"' not in there.value:
                return False
            # it was written, and the answer was lost
            written = await store.put(ORDER, text, expected=there.revision)
            if written is None:
                return False
        self.revision = written
        self._entries[ORDER] = Entry(text, written)
        return True

    async def _put_part(self, store: Store, name: str, part: Any, leader: str) -> int | None:
        key, known = _key(name), self._read.get(name)
        there = self._entries.get(key)
        if known is not None and known[1] == part and there is not None and there.revision == known[0]:
            return known[0]
        text = packed(encoded(part))
        revision = await store.put(key, text, expected=there.revision if there is not None else 0)
        if revision is None:  # an answer was lost, or another leads
            view = await store.read(JOB)
            if (one := view.entries.get(LEADER)) is None or one.value != leader:
                return None
            there = view.entries.get(key)
            revision = await store.put(key, text, expected=there.revision if there is not None else 0)
        if revision is not None:
            self._entries[key], self._read[name] = Entry(text, revision), (revision, part)
        return revision


def encoded(state: Report | Assignment | Origin) -> str:
    """As it is written."""
    return json.dumps(plain.to_sparse(state), allow_nan=False, separators=(",", ":"))


def packed(text: str) -> str:
    """Of thousands of nodes, less than half of its size: it is sent to each of them."""
    if len(text) < LONG:
        return text
    return base64.b85encode(zlib.compress(text.encode())).decode()


def unpacked(text: str) -> str:
    """What was packed. Raises ValueError."""
    if text.startswith("{"):
        return text
    try:
        return zlib.decompress(base64.b85decode(text)).decode()
    except zlib.error as error:
        raise ValueError(str(error)) from None


def _key(part: str) -> str:
    return f"{JOB}{part}"


def _with(order: Order, parts: Mapping[str, Any]) -> Order:
    return replace(order, **parts)
