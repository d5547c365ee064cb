"""What the machine can tell of a death: last log lines, torchrun's own words, the kernel's out-of-memory counters."""

from __future__ import annotations

import os
import re
from pathlib import Path

TAIL_BYTES = 16 << 10
REPORT_BYTES = 1 << 20  # torchrun's log holds every rank's output too where it was told to tee it
#: torchrun's report of a failed worker, as it has written it since 2.0
_FAILED = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")


def last_lines(path: Path, count: int = 20) -> tuple[str, ...]:
    """The last ``count`` lines of a log, or nothing when there is no log."""
    text = _end_of(path, TAIL_BYTES).decode(errors="replace")
    return tuple(line.rstrip("\r") for line in text.splitlines()[-count:])


def text_of(path: Path) -> str:
    """The end of a file, or nothing when there is none."""
    return _end_of(path, REPORT_BYTES).decode(errors="replace")


def exit_codes_in(torchrun_log: Path) -> dict[int, int]:
    """The exit code (negative: signal) of each worker, by pid, that torchrun reported as failed near the log's end."""
    return {int(pid): int(code) for code, _, pid in _FAILED.findall(_end_of(torchrun_log, REPORT_BYTES))}


def oom_kills() -> int:
    """How often the kernel has killed for memory in our cgroup (v2, else v1), else on this host; 0 when unknown."""
    for path, pattern in _oom_sources():
        try:
            match = re.search(pattern, path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if match:
            return int(match.group(1))
    return 0


def host_now() -> dict[str, float]:
    """How this host is doing: memory and swap in bytes, the load average, the number of processes."""
    import psutil  # only after a failure: it would cost every start 15 ms and 3 MB

    memory, swap, load = psutil.virtual_memory(), psutil.swap_memory(), os.getloadavg()
    return {
        "memory_total": memory.total,
        "memory_available": memory.available,
        "swap_used": swap.used,
        "load_1m": load[0],
        "processes": len(psutil.pids()),
    }


def _end_of(path: Path, count: int) -> bytes:
    """At most the last ``count`` bytes; empty when the file cannot be read."""
    try:
        with open(path, "rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - count))
            return handle.read(count)
    except OSError:
        return b""


def _oom_sources() -> list[tuple[Path, str]]:
    sources: list[tuple[Path, str]] = []
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            sources.append((Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events", r"^oom_kill (\d+)"))
        elif "memory" in controllers.split(","):
            sources.append(
                (Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.oom_control", r"^oom_kill (\d+)")
            )
    sources.append((Path("/proc/vmstat"), r"^oom_kill (\d+)"))
    return sources
