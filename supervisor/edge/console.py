"""What the user sees live: every rank's lines as they are written, everstep's own words, and a progress line.

Workers write straight into their log files, so no line is lost however they or we die. A thread of its own follows
those files and prints whole lines with the rank in front. It alone ever blocks on a slow terminal or pipe: the
supervisor never does, and since the files hold everything, a slow reader loses nothing either.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

PERIOD = 0.1  # seconds between looks at the files
CHUNK = 1 << 20
CLEAR = b"\r\x1b[K"


@dataclass
class _Tail:
    path: Path
    prefix: bytes
    offset: int = 0
    rest: bytes = b""
    ending: bool = False


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
        with contextlib.suppress(FileNotFoundError), open(tail.path, "rb") as handle:
            handle.seek(tail.offset)
            while chunk := handle.read(CHUNK):
                tail.offset += len(chunk)
                *whole, tail.rest = (tail.rest + chunk).split(b"\n")
                lines += [tail.prefix + line + b"\n" for line in whole]
        if tail.ending:
            if tail.rest:
                lines.append(tail.prefix + tail.rest + b"\n")
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


def _write(fd: int | None, text: bytes) -> int | None:
    """Write all of it; returns the descriptor to go on with: None once its reader has gone."""
    if fd is None:
        return None
    try:
        while text:
            text = text[os.write(fd, text) :]
    except OSError:
        return None  # a closed pipe is the reader's choice: the logs hold everything
    return fd
