"""The journal: ``D/journal/<node>.jsonl``, append-only, one fact a line, merged over the nodes on reading.

A line is ``{"v": 1, "fact": "Progress", "time": …, …}``, written by one ``write`` to a file opened with O_APPEND: a
SIGKILL leaves the line or not, only a power cut or a full disk can tear it. A background thread makes lines durable, so
that a relaunch never waits for a disk; ``flush`` does wait. What the disk does not take (it is full) is kept in memory
and offered again with the next fact: training goes on without its journal rather than not at all.

Reading forgives what a crash can leave: a last line without its newline is not there (yet), any other line that cannot
be read is skipped and reported. Unknown facts and fields are ignored (a newer minor version wrote them); a line of a
newer format version is reported as such.

A journal only ever grows, and one of a month holds hundreds of thousands of lines, so a ``Reader`` streams them and can
go on where it, or another one, stopped. That yields the same facts in the same order as reading the whole, on two
conditions that it checks: what was read is still there (each file is as long as it was, and its last line that was
read is what it was), and what has come since belongs behind it in the merged order. It does not when a second node's
clock lags behind; then the journal has to be read from its beginning.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    return list(Reader(directory, report).facts())


class OutOfOrderError(Exception):
    """A fact has come to light that belongs before one that was already read: read everything anew."""


@dataclass
class Place:
    """How far one file has been read."""

    offset: int = 0  # behind the newline of the last line that was read
    lines: int = 0
    newest: float = float("-inf")  # time of its newest fact
    last_bytes: int = 0  # length of the last line
    last_digest: int = 0

    def pass_over(self, line: bytes) -> None:
        """``line`` comes next and is read."""
        self.offset += len(line)
        self.lines += 1
        self.last_bytes, self.last_digest = len(line), zlib.crc32(line)

    def fits(self, path: Path) -> bool:
        """Whether what was read is still in the file, as far as its length and its last line tell."""
        try:
            with path.open("rb") as file:
                file.seek(self.offset - self.last_bytes)
                line = file.read(self.last_bytes)
        except (OSError, ValueError):
            return False
        return len(line) == self.last_bytes and zlib.crc32(line) == self.last_digest


class Reader:
    """Reads a journal on from where ``places`` (by file name) and ``newest`` say that an earlier one stopped."""

    def __init__(
        self,
        directory: Path,
        report: Report = _log.warning,
        places: dict[str, Place] | None = None,
        newest: tuple[float, str] = (float("-inf"), ""),
    ) -> None:
        self._directory = directory
        self._report = report
        self.places = {} if places is None else places
        self.newest = newest  # time and file of the last fact in the merged order

    @classmethod
    def from_now_on(cls, directory: Path, report: Report = _log.warning) -> Reader:
        """A reader of what is yet to be written."""
        sizes = {path.name: path.stat().st_size for path in directory.glob("*.jsonl")}
        return cls(directory, report, {name: Place(offset=size) for name, size in sizes.items()})

    def fits(self) -> bool:
        """Whether what was read is still there."""
        return all(place.fits(self._directory / name) for name, place in self.places.items())

    def facts(self) -> Iterator[Fact]:
        """All that is new. ``places`` and ``newest`` are right once it is exhausted.

        Raises JobError when a file cannot be read, OutOfOrderError when a fact should have come earlier.
        """
        try:
            paths = sorted(self._directory.glob("*.jsonl"))
            for time, name, fact in heapq.merge(*map(self._read, paths), key=lambda item: item[:2]):
                if (time, name) < self.newest:
                    raise OutOfOrderError(name)
                self.newest = time, name
                yield fact
        except OSError as error:
            where = error.filename or self._directory
            raise JobError(f"cannot read the journal {where}: {error.strerror}") from error

    def _read(self, path: Path) -> Iterator[tuple[float, str, Fact]]:
        place = self.places.setdefault(path.name, Place())
        with path.open("rb") as file:
            file.seek(place.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                place.pass_over(line)
                try:
                    fact = decode(line)
                except ValueError as error:
                    self._report(f"{path} line {place.lines} is skipped: {error}")
                    continue
                if fact is not None:
                    place.newest = max(place.newest, fact.time)
                    yield place.newest, path.name, fact


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
        self._beside: tuple[Path, bytes] | None = None  # to be put there once all that was written is durable
        self.size = os.fstat(self._fd).st_size  # of the file, as far as the kernel took what we wrote
        self._changed = threading.Condition()
        self._written = 0  # facts (and files to lie beside) handed over
        self._durable = 0  # of them, known to be on the disk
        self._closing = False
        self._end_torn_line()
        self._syncer = threading.Thread(target=self._sync_forever, name="journal", daemon=True)
        self._syncer.start()

    def append(self, fact: Fact) -> bytes:
        """Write one line and return it. Never raises for the disk's sake and never waits for it."""
        line = encode(fact)
        if len(self._unwritten) + len(line) <= _MOST_UNWRITTEN:
            self._unwritten += line
        if self._write():
            with self._changed:
                self._written += 1
                self._changed.notify_all()
        return line

    def put_beside(self, name: str, content: bytes) -> None:
        """Have a file of this name in the journal's directory replaced, once all that was written is durable."""
        with self._changed:
            self._beside = self.path.parent / name, content
            self._written += 1
            self._changed.notify_all()

    def flush(self, deadline: float = 30.0) -> bool:
        """Wait up to ``deadline`` seconds until all that was written is durable; whether everything appended is."""
        with self._changed:
            target = self._written
            settled = self._changed.wait_for(lambda: self._durable >= target, deadline)
        return settled and not self._refusals & {"written", "synced"} and not self._unwritten

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
        if self.size and os.pread(self._fd, 1, self.size - 1) != b"\n":
            self._unwritten += b"\n"
            self._write()

    def _write(self) -> bool:
        """Offer all that is unwritten; whether the kernel took it all."""
        try:
            while self._unwritten:
                taken = os.write(self._fd, self._unwritten)
                self.size += taken
                del self._unwritten[:taken]
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
                beside, self._beside = self._beside, None
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._refused("synced", error)
            else:
                self._refusals.discard("synced")
                if beside is not None:
                    self._replace(*beside)
            with self._changed:
                self._durable = max(self._durable, target)
                self._changed.notify_all()

    def _replace(self, path: Path, content: bytes) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError as error:
            self._refused(f"summed up in {path.name}", error)
        else:
            self._refusals.discard(f"summed up in {path.name}")
