"""How much memory there still is, and how much some processes hold: from the kernel's own tables, in microseconds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path


def available() -> int | None:
    """Bytes that can be had without swapping, on this host and in our cgroup (v2); None when nobody says."""
    found = []
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if match:
            found.append(int(match[1]) << 10)
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                found += _of_group(Path("/sys/fs/cgroup") / line[3:].lstrip("/"))
    except OSError:
        pass
    return min(found, default=None)


def _of_group(folder: Path) -> list[int]:
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        cache = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return []
    return [] if limit == "max" else [int(limit) - used + (int(cache[1]) if cache else 0)]


def resident(pids: Iterable[int]) -> int:
    """Bytes of memory that the processes hold; those that are gone hold none."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")
