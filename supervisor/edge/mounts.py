"""What kind of file system something lies in: memory, or a disk."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Final

_IN_MEMORY: Final = ("tmpfs", "ramfs")


def is_in_memory(path: Path) -> bool:
    """Whether what is written there takes memory, wherever it is mounted. Raises OSError where there is nothing."""
    return _kind_of(os.stat(path).st_dev) in _IN_MEMORY


@functools.lru_cache(maxsize=64)
def _kind_of(device: int) -> str:
    """``tmpfs``, ``ext4``, …; empty when nobody knows."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""
