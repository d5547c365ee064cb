"""What the user sees live: every rank's lines as they are written, everstep's own words, and a progress line.

Workers write straight into their log files, so no line is lost however they or we die. A thread of its own follows
those files and prints whole lines with the rank in front. It alone ever blocks on a slow terminal or pipe: the
supervisor never does, and since the files hold everything, a slow reader loses nothing either. Only an output that is
gone for good (its reader left, its terminal hung up, it was closed) is given up.

Of a progress bar, which redraws its line with carriage returns, the newest complete drawing is printed as a line of its
own, at most once a second per file, and the last one when the line ends: bars of several ranks cannot share the bottom
line of a terminal, and a log should not fill with them. A line that does not end is printed in pieces of 64 KiB or more.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from supervisor.edge import clock

PERIOD = 0.1  # seconds between looks at the files
BAR_PERIOD = 1.0  # seconds between two drawings of a progress bar
CHUNK = 1 << 20
MOST_HELD = 64 << 10  # bytes of a line that has not ended
CLEAR = b"\r\x1b[K"
_GONE = (errno.EPIPE, errno.EBADF, errno.EIO)


@dataclass
class _Tail:
    path: Path
    prefix: bytes
    offset: int = 0
    rest: bytes = b""  # of the line that has not ended; from its last carriage return on
    drawing: bytes = b""  # what the line showed before that, not printed yet
    next_drawing: float = 0.0
    ending: bool = False

    def take(self, chunk: bytes) -> list[bytes]:
        """The lines that ``chunk`` completes, as they are to be printed."""
        *whole, self.rest = (self.rest + chunk).split(b"\n")
        lines = [line for raw in whole if (line := self._end_of_line(raw)) is not None]
        drawn, returned, last = self.rest.rpartition(b"\r")
        if returned:
            self.drawing = _last_drawing(drawn) or self.drawing
            self.rest = returned + last
        if len(self.rest) > MOST_HELD:
            lines.append(self.rest.lstrip(b"\r"))
            self.rest = b""
        return lines

    def due(self, now: float) -> list[bytes]:
        """The progress bar as it is, once a second if it has moved."""
        if not self.drawing or now < self.next_drawing:
            return []
        drawing, self.drawing = self.drawing, b""
        self.next_drawing = now + BAR_PERIOD
        return [drawing]

    def end(self) -> list[bytes]:
        """What is left when nothing more will come."""
        last = self._end_of_line(self.rest) if self.rest else self.drawing
        self.rest = self.drawing = b""
        return [last] if last else []

    def _end_of_line(self, raw: bytes) -> bytes | None:
        """What a whole line shows; None when that has been printed already."""
        drawing, self.drawing = self.drawing, b""
        if b"\r" not in raw:
            return raw
        return _last_drawing(raw) or drawing or None


class Console:
    """Prints from its own thread; every method returns at once."""

    def __init__(self, *, quiet: bool = False, out: int = 1, err: int = 2) -> None:
        self.quiet = quiet
        self.is_terminal = os.isatty(err)
        self._out: int | None = out
        self._err: int | None = err
        self._tails: list[_Tail] = []
        self._said: deque[str] = deque()
        self._progress = ""
        self._shown = ""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="console", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """One line of everstep's own, to standard error, also with ``--quiet``."""
        with self._lock:
            self._said.append(text)
        self._wake.set()

    def progress(self, text: str) -> None:
        """The live line at the bottom of a terminal; without a terminal nothing is shown."""
        with self._lock:
            self._progress = text

    def follow(self, path: Path, prefix: str) -> None:
        """Print the lines that appear in ``path`` (which need not exist yet) from its start, each behind ``prefix``."""
        if self.quiet:
            return
        with self._lock:
            if all(tail.path != path for tail in self._tails):
                self._tails.append(_Tail(path, prefix.encode()))

    def finish(self, folder: Path) -> None:
        """The writers below ``folder`` are dead: print what is left, half lines too, and forget the files."""
        with self._lock:
            for tail in self._tails:
                if folder in tail.path.parents:
                    tail.ending = True
        self._wake.set()

    def close(self, patience: float = 10.0) -> None:
        """Print what is left, waiting at most ``patience`` seconds for whoever reads our output."""
        with self._lock:
            self._stopping = True
            self._progress = ""
            for tail in self._tails:
                tail.ending = True
        self._wake.set()
        self._thread.join(patience)

    def _loop(self) -> None:
        while True:
            self._wake.wait(PERIOD)
            self._wake.clear()
            with self._lock:
                stopping, tails = self._stopping, list(self._tails)
                said = list(self._said)
                self._said.clear()
            lines: list[bytes] = []
            for tail in tails:
                self._read(tail, lines)
            if lines:
                self._print_lines(b"".join(lines))
            for text in said:
                self._print_said(text)
            self._print_progress()
            if stopping:
                return

    def _read(self, tail: _Tail, lines: list[bytes]) -> None:
        found: list[bytes] = []
        try:
            with open(tail.path, "rb") as handle:
                handle.seek(tail.offset)
                while chunk := handle.read(CHUNK):
                    tail.offset += len(chunk)
                    found += tail.take(chunk)
        except OSError:
            pass  # not there yet, or storage that fails: the next round tries again
        found += tail.end() if tail.ending else tail.due(clock.monotonic())
        lines += [tail.prefix + line + b"\n" for line in found]
        if tail.ending:
            with self._lock:
                self._tails.remove(tail)

    def _print_lines(self, text: bytes) -> None:
        self._hide_progress()
        self._out = _write(self._out, text)

    def _print_said(self, text: str) -> None:
        self._hide_progress()
        self._err = _write(self._err, f"everstep: {text}\n".encode())

    def _hide_progress(self) -> None:
        if self._shown:
            self._err = _write(self._err, CLEAR)
            self._shown = ""

    def _print_progress(self) -> None:
        if not self.is_terminal or self.quiet:
            return
        with self._lock:
            wanted = self._progress
        wanted = wanted[: shutil.get_terminal_size().columns - 1]
        if wanted != self._shown:
            self._err = _write(self._err, CLEAR + wanted.encode())
            self._shown = wanted


def _last_drawing(line: bytes) -> bytes:
    """What is to be seen after the last carriage return that something follows; empty when nothing is."""
    return next((part for part in reversed(line.split(b"\r")) if part.strip()), b"")


def _write(fd: int | None, text: bytes) -> int | None:
    """Write all of it, however long the reader takes; returns the descriptor to go on with: None once that is gone."""
    if fd is None:
        return None
    while text:
        try:
            text = text[os.write(fd, text) :]
        except BlockingIOError:  # whoever shares it with us has made it non-blocking
            room = select.poll()
            room.register(fd, select.POLLOUT)
            room.poll()
        except OSError as error:
            # the reader's choice, and the logs hold everything; a full disk may have room for the next line
            return None if error.errno in _GONE else fd
    return fd
