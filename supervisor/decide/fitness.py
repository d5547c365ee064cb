"""Is this host fit to run a job? Judgements of what was measured: facts in, one finding out. Pure.

A finding is *broken* where a job cannot run or would lose state, a *warning* where it runs worse than it could or will meet
trouble under a condition that is named, and *ok* otherwise. What is not ok comes with what to do about it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

SMALL_SHM: Final = 512 << 20  # bytes: below, snapshots go to disk (``edge/jobdir``)
FEW_FILES: Final = 4096
FEW_PROCESSES: Final = 4096
LITTLE_LOCKED: Final = 1 << 30  # bytes
SLOW_STORAGE: Final = 50e6  # bytes a second
SLOW_SYNC: Final = 1.0  # seconds
SKEW: Final = 2.0  # seconds
EARLIEST: Final = 1735689600.0  # Unix seconds: no clock that is right shows a time before 2025
SUPPORTED: Final = ((2, 11), (2, 16))  # torch: from, below
#: the CUDA version that torch was built for → the oldest driver that runs it (NVIDIA's release notes)
DRIVERS: Final = {11: 450, 12: 525, 13: 580}


class Level(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. ``mend``: what to do, where it is not ok."""

    check: str
    level: Level
    found: str
    mend: str | None = None


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check=check, level=Level.OK, found=found)


def warning(check: str, found: str, mend: str) -> Finding:
    """It will do, or not quite."""
    return Finding(check=check, level=Level.WARNING, found=found, mend=mend)


def broken(check: str, found: str, mend: str) -> Finding:
    """It will not do."""
    return Finding(check=check, level=Level.BROKEN, found=found, mend=mend)


def size(count: float) -> str:
    """``64 MB``, ``1.5 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def shared_memory(total: int | None, free: int, writable: bool, needed: int | None) -> Finding:
    """``/dev/shm``: ``total`` bytes (None: there is none), and what the job's snapshots need there, where that is known."""
    name = "/dev/shm"
    mend = "snapshots go to the temporary directory; for memory, enlarge it (docker run --shm-size=…, an emptyDir of medium Memory)"
    if total is None or not writable:
        return warning(name, "not there" if total is None else "not writable", mend)
    found = f"{size(free)} free of {size(total)}"
    if total < SMALL_SHM:
        return warning(name, f"{found}: too small for snapshots", mend)
    if needed is not None and free < needed:
        return warning(name, f"{found}; this job's snapshots need {size(needed)}", mend)
    return ok(name, found if needed is None else f"{found}, {size(needed)} needed")


def memory(limit: int | None, available: int | None, needed: int | None) -> Finding:
    """The cgroups' limit (None: there is none), what can be had, and what the job's snapshots need."""
    name = "memory"
    parts = [
        f"{size(available)} available" if available is not None else "unknown",
        f"limit of the cgroup {size(limit)}" if limit is not None else "no limit by a cgroup",
    ]
    if needed is not None and available is not None and available < needed:
        text = f"{', '.join(parts)}; this job's snapshots need {size(needed)}"
        return warning(
            name, text, "what does not fit goes to disk; ask for more (sbatch --mem, docker run --memory)"
        )
    return ok(name, ", ".join(parts))


def open_files(soft: int | None, hard: int | None) -> Finding:
    """``ulimit -n``; None: unlimited."""
    if soft is None or soft >= FEW_FILES:
        return ok("open files", "unlimited" if soft is None else str(soft))
    can = f"ulimit -n {hard if hard is not None else 1 << 20}"
    mend = can if hard is None or hard >= FEW_FILES else "raise nofile in /etc/security/limits.conf"
    judge = broken if soft < 256 else warning
    return judge("open files", f"{soft}: data loaders and NCCL need thousands", mend)


def processes(soft: int | None) -> Finding:
    """``ulimit -u``; None: unlimited."""
    if soft is None or soft >= FEW_PROCESSES:
        return ok("processes", "unlimited" if soft is None else str(soft))
    return warning(
        "processes", f"{soft}, threads included", f"ulimit -u {4 * FEW_PROCESSES}, or nproc in limits.conf"
    )


def locked_memory(soft: int | None, infiniband: bool) -> Finding:
    """``ulimit -l`` in bytes; None: unlimited. RDMA registers memory, which locks it."""
    text = "unlimited" if soft is None else size(soft)
    if soft is None or soft >= LITTLE_LOCKED or not infiniband:
        return ok("locked memory", text)
    mend = "ulimit -l unlimited (memlock in limits.conf; under SLURM LimitMEMLOCK=infinity for slurmd)"
    return warning("locked memory", f"{text}, and there is InfiniBand", mend)


def clock(now: float, skew: float | None) -> Finding:
    """The host's clock, and by how much the file server's of the job directory is ahead of it (None: not known)."""
    if now < EARLIEST:
        return broken("clock", "it shows a time before 2025", "set it (timedatectl set-ntp true)")
    if skew is None:
        return ok("clock", "plausible")
    text = f"{abs(skew):.1f} s {'behind' if skew > 0 else 'ahead of'} the file system's"
    if abs(skew) > SKEW:
        return warning("clock", text, "synchronise both (chrony, ntpd): the journal is ordered by time")
    return ok("clock", "agrees with the file system's")


def ports(free: int | None, first: int, last: int) -> Finding:
    """A port that could be bound on the loopback (None: none could), and the range they come from."""
    if free is None:
        return broken("ports", "none can be bound on 127.0.0.1", "bring the loopback up (ip link set lo up)")
    if last - first < 1000:
        return warning(
            "ports",
            f"only {last - first + 1} ephemeral ones",
            "sysctl net.ipv4.ip_local_port_range='32768 60999'",
        )
    return ok("ports", f"free ({first} to {last})")


class Door(enum.Enum):
    """What was found at the address of a store that a node serves."""

    FREE = enum.auto()  # it is this host's, and could be listened at
    TAKEN = enum.auto()  # it is this host's, and somebody listens there
    ANSWERS = enum.auto()  # it is another host's, and somebody listens there
    SHUT = enum.auto()  # … and nobody does so far
    UNREACHED = enum.auto()


def door(where: str, found: Door, why: str = "") -> Finding:
    """Where the nodes of a job meet, at a port of one of them."""
    name = "store"
    match found:
        case Door.FREE:
            return ok(name, f"{where}: this host's, and free")
        case Door.ANSWERS:
            return ok(name, f"{where}: answers")
        case Door.SHUT:
            return ok(name, f"{where}: the host is reached; nobody serves there yet")
        case Door.TAKEN:
            return warning(
                name, f"{where}: taken on this host", "unless that is the job itself: another port (--store)"
            )
        case Door.UNREACHED:
            return broken(
                name,
                f"{where}: {why}",
                "the nodes must reach it: firewall, routes, or another host (--store)",
            )


@dataclass(frozen=True, kw_only=True)
class DirectoryProbe:
    """What a file of ``bytes`` went through in a directory. Times in seconds."""

    bytes: int
    write: float
    sync: float
    free: int
    links: bool  # hard links can be made
    locks: bool  # flock works
    failed: str | None = None  # the first operation that failed, and why


def directory(name: str, where: str, probe: DirectoryProbe) -> Finding:
    """A place for the job or its checkpoints."""
    if probe.failed is not None:
        return broken(
            name, f"{where}: {probe.failed}", "give a directory that can be written to (--dir, --checkpoints)"
        )
    speed = probe.bytes / max(1e-6, probe.write + probe.sync)
    found = f"{where}: {size(speed)}/s, fsync {probe.sync * 1000:.0f} ms, {size(probe.free)} free"
    if not probe.locks:
        return warning(
            name,
            f"{found}; no locks",
            "two supervisors are then kept apart by epochs only (Lustre: mount -o flock)",
        )
    if probe.sync > SLOW_SYNC or speed < SLOW_STORAGE:
        return warning(
            name, f"{found}: slow", "checkpoints will take long; prefer a parallel or a local file system"
        )
    if not probe.links:
        return warning(name, f"{found}; no hard links", "files that did not change are then copied each time")
    return ok(name, found)


@dataclass(frozen=True, kw_only=True)
class BucketProbe:
    """What became of small objects in an object store; ``speed`` in bytes a second."""

    speed: float = 0.0
    conditional: bool = True  # a second put-if-absent was refused
    failed: str | None = None


def bucket(where: str, probe: BucketProbe) -> Finding:
    """A prefix of an object store."""
    name = "checkpoints"
    if probe.failed is not None:
        return broken(
            name,
            f"{where}: {probe.failed}",
            "check the URL, the endpoint and the credentials in the environment",
        )
    found = f"{where}: {size(probe.speed)}/s"
    if not probe.conditional:
        return broken(
            name, f"{found}; it overwrites where it must not",
            "use a store that honours If-None-Match: two supervisors could spoil each other's checkpoints",
        )  # fmt: skip
    if probe.speed < SLOW_STORAGE:
        return warning(name, f"{found}: slow", "checkpoints will take long; a store nearer to the host?")
    return ok(name, f"{found}, put-if-absent is honoured")


def torch(version: str | None, cuda: str | None, gpus: int, driver: str | None) -> Finding:
    """torch as installed, the CUDA that it was built for, the GPUs in this host and their driver (None: none)."""
    if version is None:
        return broken("torch", "not installed here", "pip install 'torch>=2.11,<2.16' into this environment")
    found = version + (f" for CUDA {cuda}" if cuda else "") + (f", driver {driver}" if driver else "")
    number = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    low, below = SUPPORTED
    if not low <= number < below:
        text = f"{low[0]}.{low[1]} to {below[0]}.{below[1] - 1}"
        return warning("torch", found, f"everstep is tested with torch {text}")
    if gpus and cuda is None and "rocm" not in version:
        return warning(
            "torch", f"{found}; {gpus} GPUs here", "this torch is built without CUDA: install another build"
        )
    if gpus and cuda is not None and driver is None:
        return broken("torch", f"{found}; {gpus} GPUs here and no driver", "install the NVIDIA driver")
    if cuda is not None and driver is not None:
        oldest = DRIVERS.get(int(cuda.split(".")[0]))
        if oldest is not None and int(driver.split(".")[0]) < oldest:
            return broken("torch", found, f"CUDA {cuda} needs driver {oldest} or newer")
    return ok("torch", found)
