"""What the machine can tell of a death: last log lines, torchrun's own words, the kernel's out-of-memory counters."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

#: where torch is told to write the flight recorder's dumps, today's name and the older one
FLIGHT_RECORDS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
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


def collect_flight_records(folder: Path) -> list[str]:
    """The dumps of NCCL's flight recorder that this attempt has left, all below ``folder / "flight"`` now.

    They are there already unless the user has chosen another place; there only what is newer than the attempt is ours.
    """
    own = folder / "flight"
    chosen = next((os.environ[name] for name in FLIGHT_RECORDS if os.environ.get(name)), None)
    if chosen is not None:
        began = (folder / "logs").stat().st_mtime
        for path in Path(chosen).parent.glob(Path(chosen).name + "*"):
            if path.is_file() and path.stat().st_mtime >= began:
                own.mkdir(exist_ok=True)
                shutil.copy2(path, own / path.name)
    return sorted(str(path) for path in own.glob("*")) if own.is_dir() else []


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
    # in a container, the path above may be the host's: its own group is mounted at the root
    sources.append((Path("/sys/fs/cgroup/memory.events"), r"^oom_kill (\d+)"))
    sources.append((Path("/sys/fs/cgroup/memory/memory.oom_control"), r"^oom_kill (\d+)"))
    sources.append((Path("/proc/vmstat"), r"^oom_kill (\d+)"))
    return sources
