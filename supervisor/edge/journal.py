"""The journal: ``D/journal/<node>.jsonl``, append-only, one fact a line, merged over the nodes on reading.

A line is ``{"v": 1, "fact": "Progress", "time": …, …}``, written by one ``write`` to a file opened with O_APPEND: a
SIGKILL leaves the line or not, only a power cut or a full disk can tear it. A background thread makes lines durable, so
that a relaunch never waits for a disk; ``flush`` does wait. What the disk does not take (it is full) is kept in memory
and offered again with the next fact: training goes on without its journal rather than not at all.

Reading forgives what a crash can leave: a torn last line is dropped in silence, any other line that cannot be read is
skipped and reported. Unknown facts and fields are ignored (a newer minor version wrote them); a line of a newer format
version is reported as such.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from supervisor.edge.plain import from_plain, to_plain
from supervisor.errors import JobError
from supervisor.model import FACTS, Fact

VERSION: Final = 1
_MOST_UNWRITTEN: Final = 4 << 20

#: is told, in one line, what went wrong
Report = Callable[[str], None]

_log = logging.getLogger("everstep.journal")


def encode(fact: Fact) -> bytes:
    """One line, with its newline."""
    plain = {"v": VERSION, "fact": type(fact).__name__, **to_plain(fact)}
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Fact | None:
    """The fact of one line; None for a kind of fact that this version does not know.

    Raises ValueError, saying why, when the line is no fact or of a newer format.
    """
    try:
        plain = json.loads(line)
    except ValueError:
        raise ValueError("no JSON") from None
    version = plain.get("v") if isinstance(plain, dict) else None
    match version:
        case int() if version > VERSION:
            raise ValueError(
                f"written by a newer everstep (journal version {version}, this one reads up to {VERSION}): upgrade"
            )
        case int():
            pass
        case _:
            raise ValueError("no line of a journal")
    kind = FACTS.get(plain.get("fact", ""))
    return None if kind is None else from_plain(kind, plain)


def read(directory: Path, report: Report = _log.warning) -> list[Fact]:
    """Every fact of the journal in ``directory``, all nodes merged by time; empty when there is none.

    Each node's own order is kept even where its clock was set back. Raises JobError when a file cannot be read.
    """
    try:
        paths = sorted(directory.glob("*.jsonl"))
        return [
            fact
            for _, fact in heapq.merge(*(_read(path, report) for path in paths), key=lambda pair: pair[0])
        ]
    except OSError as error:
        raise JobError(f"cannot read the journal {error.filename or directory}: {error.strerror}") from error


def _read(path: Path, report: Report) -> Iterator[tuple[float, Fact]]:
    now = float("-inf")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fact = decode(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    report(f"{path} line {number} is skipped: {error}")
                continue
            if fact is not None:
                now = max(now, fact.time)
                yield now, fact


class Journal:
    """An open journal file of this node; only its supervisor appends to it.

    Raises JobError from the constructor when the file cannot be opened. Afterwards a disk that refuses is told to
    ``report`` once, and again only if it had recovered.
    """

    def __init__(self, path: Path, report: Report = _log.warning) -> None:
        self.path = path
        self._report = report
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JobError(f"cannot write the journal {path}: {error.strerror}") from error
        self._unwritten = bytearray()
        self._refusals: set[str] = set()  # what the disk does not do at present: "written", "synced"
        self._changed = threading.Condition()
        self._written = 0  # facts handed to the kernel
        self._durable = 0  # of them, known to be on the disk
        self._closing = False
        self._end_torn_line()
        self._syncer = threading.Thread(target=self._sync_forever, name="journal", daemon=True)
        self._syncer.start()

    def append(self, fact: Fact) -> None:
        """Write one line. Never raises for the disk's sake and never waits for it."""
        line = encode(fact)
        if len(self._unwritten) + len(line) <= _MOST_UNWRITTEN:
            self._unwritten += line
        if self._write():
            with self._changed:
                self._written += 1
                self._changed.notify_all()

    def flush(self, deadline: float = 30.0) -> bool:
        """Wait up to ``deadline`` seconds until all that was written is durable; whether everything appended is."""
        with self._changed:
            target = self._written
            settled = self._changed.wait_for(lambda: self._durable >= target, deadline)
        return settled and not self._refusals and not self._unwritten

    def close(self) -> None:
        """Flush and close. The journal cannot be used afterwards."""
        self._write()
        self.flush()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._syncer.join()
        os.close(self._fd)

    def _end_torn_line(self) -> None:
        """A predecessor's torn last line must not swallow our first one."""
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._unwritten += b"\n"

    def _write(self) -> bool:
        """Offer all that is unwritten; whether the kernel took it all."""
        try:
            while self._unwritten:
                del self._unwritten[: os.write(self._fd, self._unwritten)]
        except OSError as error:
            self._refused("written", error)
            return False
        self._refusals.discard("written")
        return True

    def _refused(self, what: str, error: OSError) -> None:
        with self._changed:
            known = what in self._refusals
            self._refusals.add(what)
            self._changed.notify_all()
        if not known:
            self._report(
                f"the journal {self.path} cannot be {what} ({error.strerror}); the run goes on without"
            )

    def _sync_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._written > self._durable)
                if self._closing:
                    return
                target = self._written
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._refused("synced", error)
            else:
                self._refusals.discard("synced")
            with self._changed:
                self._durable = max(self._durable, target)
                self._changed.notify_all()
