"""Reading the stacks that ``faulthandler`` writes: which thread is the main one, where it is, and whether it waits for others.

A dump lists every thread, innermost frame first; the thread that took the signal, which is the main one as long as it does not
block it, is called the current one. Python frames only: a call into C++ shows as the frame that made it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_THREAD: Final = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$")
_FRAME: Final = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<name>.*)$')
_OURS: Final = "/launch/vital.py"
MOST_FRAMES: Final = 24  # of a thread, in the shortened text

#: where Python code waits for other ranks: (end of the file's folder or name, function or "" for any)
_WAITS: Final = (
    ("/torch/distributed/", ""),
    ("/supervisor/edge/futex.py", ""),  # a save point
    ("/torch/autograd/graph.py", "_engine_run_backward"),  # DDP's and FSDP's collectives run below it
    ("/torch/cuda/__init__.py", "synchronize"),
    ("/torch/cuda/streams.py", ""),
)


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: str
    name: str

    @property
    def is_library(self) -> bool:
        """Whether it is none of the user's own code."""
        return "/site-packages/" in self.file or "/lib/python3" in self.file or self.file.startswith("<")

    def __str__(self) -> str:
        return f"{_short(self.file)}:{self.line} ({self.name})"


def threads(text: str) -> list[tuple[bool, list[Frame]]]:
    """Every thread of a dump: whether it is the current one, and its frames, innermost first."""
    found: list[tuple[bool, list[Frame]]] = []
    for line in text.splitlines():
        if match := _THREAD.match(line):
            found.append((match[1] == "Current thread", []))
        elif found and (match := _FRAME.match(line)):
            found[-1][1].append(Frame(match["file"], match["line"], match["name"]))
    return found


def main_thread(text: str) -> list[Frame]:
    """The frames of the main thread, innermost first; none when there is no dump."""
    return next((frames for current, frames in threads(text) if current), [])


def is_wait(frames: list[Frame]) -> bool:
    """Whether the innermost place is one where ranks wait for one another."""
    return bool(frames) and any(
        part in frames[0].file and name in ("", frames[0].name) for part, name in _WAITS
    )


def place(frames: list[Frame]) -> str | None:
    """The innermost place and, where that is a library's, the user's own line that led there."""
    if not frames:
        return None
    own = next((frame for frame in frames if not frame.is_library), None)
    if own is None or own is frames[0]:
        return str(frames[0])
    return f"{own}, in {frames[0]}"


def shortened(text: str) -> list[str]:
    """The dump without our own thread, the main thread first, long stacks cut in the middle."""
    lines: list[str] = []
    for current, frames in sorted(threads(text), key=lambda thread: not thread[0]):
        if frames and frames[0].file.endswith(_OURS):
            continue
        lines.append("main thread:" if current else "another thread:")
        shown = [f"  {frame}" for frame in frames]
        if len(shown) > MOST_FRAMES:
            half = MOST_FRAMES // 2
            shown[half:-half] = [f"  … {len(shown) - 2 * half} more …"]
        lines += shown
    return lines


def _short(file: str) -> str:
    """Enough of a path to find the file by."""
    for mark in ("/site-packages/", "/dist-packages/"):
        if mark in file:
            return file.rpartition(mark)[2]
    return "/".join(file.rsplit("/", 2)[-2:]) if "/lib/python3" not in file else file.rpartition("/")[2]
