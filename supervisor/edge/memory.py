"""How much memory there still is, and how much some processes hold: from the kernel's own tables, in microseconds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.edge import mounts
from supervisor.edge.files import free_bytes

_ROOT: Final = Path("/sys/fs/cgroup")
_NO_LIMIT: Final = 1 << 62  # bytes; version 1 has no other word for it


@dataclass(frozen=True)
class _Version:
    """What the files of one version of cgroups are called."""

    limit: str
    used: str
    cache: str  # of memory.stat: file pages that are given back when somebody needs the room


_V1: Final = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2: Final = _Version("memory.max", "memory.current", "inactive_file")


def room(folder: Path) -> int:
    """Bytes that files in it can still take, without swapping where they are kept in memory. Raises OSError."""
    free = free_bytes(folder)
    try:
        in_memory = mounts.is_in_memory(folder)
    except OSError:  # nobody says
        in_memory = False
    left = available() if in_memory else None
    return free if left is None else min(free, left)


def available() -> int | None:
    """Bytes that can be had without swapping, on this host and in our cgroups; None when nobody says."""
    found = [room for _, room in _groups("self")]
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if match:
            found.append(int(match[1]) << 10)
    except OSError:
        pass
    return min(found, default=None)


def total() -> int:
    """Bytes that this process may use at most: the host's memory, or the lowest limit of its cgroups."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(host, limit(os.getpid()) or host)


def limit(pid: int) -> int | None:
    """Bytes that a process and those beside it may use by its cgroups; None without a limit, or when nobody says."""
    return min((most for most, _ in _groups(str(pid))), default=None)


def _groups(process: str) -> Iterator[tuple[int, int]]:
    """The limit of each cgroup that has one, and what is left of it: the process's own, and those around it."""
    try:
        lines = Path("/proc", process, "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, version = _ROOT, _V2
        elif "memory" in controllers.split(","):
            root, version = _ROOT / "memory", _V1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _of_group(folder, version)
            if folder == root:
                break


def _of_group(folder: Path, version: _Version) -> Iterator[tuple[int, int]]:
    try:
        text = (folder / version.limit).read_text().strip()
        if text == "max" or (most := int(text)) >= _NO_LIMIT:
            return
        used = int((folder / version.used).read_text())
        cache = re.search(rf"^{version.cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return
    yield most, most - used + (int(cache[1]) if cache else 0)


def resident(pids: Iterable[int]) -> int:
    """Bytes of memory that the processes hold; those that are gone hold none."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")
