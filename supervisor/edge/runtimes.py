"""A job's runtime directory on a node: what it has in memory.

It lies in tmpfs where that is big enough, owned by the user alone. Who uses it holds a lock in it, which dies with the process.
``sweeping`` removes those that nobody will want again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import IO, Final

from supervisor.edge import mounts
from supervisor.errors import JobError

OWNER, MEMBER = "job", "member"  # files that name the job directory, where the job leads back here or not
SHM: Final = Path("/dev/shm")
SMALL_TMPFS: Final = 512 << 20  # bytes; a container's default /dev/shm is 64 MiB
LOCK: Final = "lock"
SIGHT: Final = "sight"  # a file that tells how the job directory was seen by who laid it out


def make(run_id: str, node: str | None = None) -> Path:
    """The job's runtime directory on this node: in tmpfs where that is big enough, owned by the user alone.

    ``node``: its name, where a job runs on several.
    """
    root = SHM if _tmpfs_is_fit() else Path(tempfile.gettempdir())
    mine = root / f"everstep-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if not is_private(mine):
        raise JobError(f"{mine} belongs to somebody else or is open to others: remove it")
    runtime = mine / (run_id[:12] if node is None else f"{run_id[:12]}@{node}")
    runtime.mkdir(mode=0o700, exist_ok=True)
    return runtime


def is_private(path: Path) -> bool:
    """Whether it is this user's, and closed to all others."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o077


def is_of_another(runtime: Path, file: Path) -> bool:
    """Whether it belongs to another job directory than that of the job file ``file``, which was copied from there (or to it)."""
    try:
        owner = Path((runtime / OWNER).read_text()) / file.name
        return owner.exists() and not owner.samefile(file)
    except OSError:
        return False


def lay_out(runtime: Path, job: Path, epoch: int = 0, engine: str = "", *, follows: bool = False) -> IO[str]:
    """Make the control and slot folders; what an earlier supervisor left there stays (its snapshots are wanted).

    ``epoch``: of the supervisor that uses it. ``engine``: what gave the job its time, for those who clean up after it.
    ``follows``: it is that of a node which does not lead the job, so that the job's file does not name it.
    Returns its lock, to be closed by whoever uses it, at the end.
    """
    booted = boot()
    stamp = runtime / "boot"
    if stamp.exists() and stamp.read_text() != booted:
        remove(runtime)  # on disk, and cut off by a reboot: nothing of it was synced
    lock = _locked(runtime)
    for left in (runtime / "control", *runtime.glob("slots/*.aside")):
        shutil.rmtree(left, ignore_errors=True)
    for name in ("control", "slots/0", "slots/1", "slots/2"):
        if (runtime / name).is_symlink() and not (runtime / name).is_dir():
            (runtime / name).unlink()  # a slot that was moved to disk, and swept there by somebody
        (runtime / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp.write_text(booted)
    (runtime / (OWNER, MEMBER)[follows]).write_text(str(job))
    (runtime / (MEMBER, OWNER)[follows]).unlink(missing_ok=True)
    (runtime / "epoch").write_text(str(epoch))
    (runtime / "engine").write_text(engine)
    (runtime / SIGHT).write_text("\n".join(sight(job)))
    return lock


def _locked(runtime: Path) -> IO[str]:
    """The lock, held beside others of this job. Whoever sweeps holds it alone, and takes the directory away with it."""
    while True:
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(runtime / LOCK, "a")  # noqa: SIM115 (held to the end)
        with contextlib.suppress(OSError):  # without locks, nothing is swept that has one
            fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(runtime / LOCK)):
                return lock
        lock.close()


def sight(job: Path) -> list[str]:
    """By what to tell whether somebody sees the same files at ``job``: the mounts that he has, and what the job lies in."""
    found = []
    with contextlib.suppress(OSError):
        found.append(os.readlink("/proc/self/ns/mnt"))
    with contextlib.suppress(OSError):
        status = job.parent.stat()
        found.append(f"{status.st_dev}:{status.st_ino}")
    return found


def remove(runtime: Path) -> None:
    """Leave nothing in this node's memory."""
    for slot in runtime.glob("slots/*"):
        if slot.is_symlink():
            shutil.rmtree(slot.resolve(), ignore_errors=True)
    shutil.rmtree(runtime, ignore_errors=True)


# --------------------------------------------------------------------------- slots on disk


def move_slot_to_disk(slot: Path) -> Path | None:
    """Let the slot lie on a disk from now on, where it lay in memory; where, or None if it stays. Raises OSError."""
    disk = _disk()
    if disk is None or slot.is_symlink() or not mounts.is_in_memory(slot):
        return None
    place = Path(tempfile.mkdtemp(prefix=f"{_slots_of_this_boot()}-", dir=disk))
    aside = slot.with_name(f"{slot.name}.aside")
    try:
        slot.rename(aside)  # in one step: somebody may be about to make files in it
        try:
            slot.symlink_to(place)
        except OSError:
            aside.rename(slot)
            raise
    except OSError:
        place.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return place


def _disk() -> Path | None:
    """Where there is room for files that takes no memory."""
    for place in (Path(tempfile.gettempdir()), Path("/var/tmp")):
        with contextlib.suppress(OSError):
            if os.access(place, os.W_OK) and not mounts.is_in_memory(place):
                return place
    return None


def _slots_on_this_host() -> str:
    return f"everstep-{os.getuid()}-slot@{socket.gethostname()}@"


def _slots_of_this_boot() -> str:
    return _slots_on_this_host() + boot().partition("-")[0]


def slots_on_disk_of_other_boots() -> list[Path]:
    """Those of this host from before it was booted: what led to them was in memory."""
    disk, kept = _disk(), _slots_of_this_boot()
    if disk is None:
        return []
    found = disk.glob(f"{_slots_on_this_host()}*")
    return [place for place in found if not place.name.startswith(kept) and is_private(place)]


def boot() -> str:
    """Which boot of this host it is."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _tmpfs_is_fit() -> bool:
    try:
        usage = os.statvfs(SHM)
    except OSError:
        return False
    return usage.f_blocks * usage.f_frsize >= SMALL_TMPFS and os.access(SHM, os.W_OK)
