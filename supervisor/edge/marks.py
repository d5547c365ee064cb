"""Whether files are as they were: what a script that ran ahead has read (``launch/ahead.py``, which makes the marks)."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

#: inode, bytes, nanoseconds of the last change; None: it was not there
Mark = list[int] | None


def changed(marks: Mapping[str, Mark]) -> list[str]:
    """The files that are not as they were, in order."""
    return sorted(name for name, mark in marks.items() if _now(name) != mark)


def mark_of(found: os.stat_result) -> Mark:
    """Other for a file that was written or replaced since; of a directory only whether it is the same one."""
    if stat.S_ISDIR(found.st_mode):
        return [found.st_ino, 0, 0]
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _now(name: str) -> Mark:
    try:
        return mark_of(os.stat(name))
    except (OSError, ValueError):
        return None
