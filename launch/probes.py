"""What a host is like, measured: each probe does one thing, changes nothing that lasts, and needs nothing installed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import shutil
import socket
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from supervisor.decide.fitness import BucketProbe, DirectoryProbe, Door
from supervisor.errors import EverstepError

if TYPE_CHECKING:
    from supervisor.checkpoint.location import Remote

SHM: Final = Path("/dev/shm")
WRITE: Final = 64 << 20  # bytes into a directory, if that is done in WRITE_FOR seconds
WRITE_FOR: Final = 3.0
PUT: Final = 8 << 20  # bytes into an object store
_CHUNK: Final = 4 << 20


def shared_memory() -> tuple[int | None, int, bool]:
    """Size of /dev/shm in bytes (None: there is none), what is free of it, and whether it can be written."""
    try:
        usage = os.statvfs(SHM)
    except OSError:
        return None, 0, False
    return usage.f_blocks * usage.f_frsize, usage.f_bavail * usage.f_frsize, os.access(SHM, os.W_OK)


def limit(which: int) -> tuple[int | None, int | None]:
    """The soft and the hard limit of a resource; None: unlimited."""
    soft, hard = resource.getrlimit(which)
    return tuple(None if value == resource.RLIM_INFINITY else value for value in (soft, hard))  # type: ignore[return-value]


def has_infiniband() -> bool:
    """Whether there is a device for RDMA."""
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def ports() -> tuple[int | None, int, int]:
    """A free port of the loopback (None: none), and the first and the last that the kernel gives away."""
    free = None
    with contextlib.suppress(OSError), socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        free = int(one.getsockname()[1])
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        first, last = 32768, 60999
    return free, first, last


def door(host: str, port: int, timeout: float) -> tuple[Door, str]:
    """What is at an address where a node is to serve, or serves, the job's store; and why it is not reached."""
    from supervisor.edge.store import address

    if address.is_ours(host):
        try:
            socket.create_server((address.listening_host(host) or "", port)).close()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return (Door.TAKEN if taken else Door.UNREACHED), error.strerror or str(error)
        return Door.FREE, ""
    try:
        socket.create_connection((host, port), timeout).close()
    except ConnectionRefusedError:
        return Door.SHUT, ""
    except OSError as error:
        return Door.UNREACHED, error.strerror or str(error)
    return Door.ANSWERS, ""


def skew(folder: Path) -> float | None:
    """Seconds by which the clock of the file system of ``folder`` is ahead of ours; None where that cannot be seen."""
    file = folder / f".everstep-clock-{uuid.uuid4().hex}"
    try:
        before = time.time()
        file.touch()
        after = time.time()
        stamp = file.stat().st_mtime
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
    return min(0.0, stamp - before) + max(0.0, stamp - after)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: the same file system, most likely."""
    return next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))


def directory(folder: Path) -> DirectoryProbe:
    """Write a file there and do to it what a commit does; everything is removed again."""
    name, times = folder / f".everstep-doctor-{uuid.uuid4().hex}", {"write": 0.0, "sync": 0.0}
    written, at, links, locks, free = 0, "making a directory", True, True, 0
    try:
        name.mkdir()
        at = "writing"
        with open(name / "file", "wb", buffering=0) as file:
            began = time.monotonic()
            while written < WRITE and time.monotonic() - began < WRITE_FOR:
                written += file.write(os.urandom(1 << 16) * (_CHUNK >> 16))
            times["write"] = time.monotonic() - began
            at, began = "fsync", time.monotonic()
            os.fsync(file.fileno())
            times["sync"] = time.monotonic() - began
            locks = _locks(file.fileno())
        at = "renaming"
        (name / "file").rename(name / "renamed")
        links = _links(name / "renamed", name / "linked")
        at = "fsync of a directory"
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        free = shutil.disk_usage(name).free
    except OSError as error:
        return DirectoryProbe(
            bytes=written,
            write=0.0,
            sync=0.0,
            free=0,
            links=False,
            locks=False,
            failed=f"{at}: {error.strerror}",
        )
    finally:
        shutil.rmtree(name, ignore_errors=True)
    return DirectoryProbe(
        bytes=written, write=times["write"], sync=times["sync"], free=free, links=links, locks=locks
    )


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _links(file: Path, link: Path) -> bool:
    try:
        os.link(file, link)
    except OSError:
        return False
    return True


def bucket(where: Remote, timeout: float) -> BucketProbe:
    """Write, read, and write again if-absent; everything is removed again. Raises ImportError without the extra [cloud]."""
    from supervisor.checkpoint.bucket import Bucket, Limits, TakenError, connect, run

    limits = Limits(timeout=timeout, attempts=1)
    name, data = f"everstep-doctor-{uuid.uuid4().hex}", os.urandom(PUT)

    async def probe(one: Bucket) -> tuple[float, bool]:
        began = time.monotonic()
        await one.put(name, data)
        speed = len(data) / (time.monotonic() - began)
        try:
            if await one.get(name, PUT) != data:
                raise EverstepError(f"{where} does not give back what was written")
            try:
                await one.put(name, b"", create=True)
            except TakenError:
                return speed, True
            return speed, False
        finally:
            await one.delete([name])

    try:
        speed, conditional = run(probe(Bucket(connect(where, limits), where, limits)))
    except EverstepError as error:
        return BucketProbe(failed=str(error))
    return BucketProbe(speed=speed, conditional=conditional)


def torch() -> tuple[str | None, str | None]:
    """The version of torch that is installed beside us, and of the CUDA that it was built for; it is not imported."""
    try:
        found = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None, None
    try:
        source = Path(str(found.locate_file("torch/version.py"))).read_text()
    except OSError:
        return found.version, None
    version = re.search(r"^__version__ = '([^']+)'", source, re.MULTILINE)
    cuda = re.search(r"^cuda[^=]*= '([0-9.]+)'", source, re.MULTILINE)
    return version[1] if version else found.version, cuda[1] if cuda else None


def gpus() -> tuple[int, str | None]:
    """How many NVIDIA GPUs the host has, and the version of their driver (None: there is none)."""
    count = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            count += vendor == "0x10de" and kind.startswith("0x03")
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return count, None
    found = re.search(r"Module[^0-9]*(?:for \S+\s+)?([0-9]+\.[0-9.]+)", text)
    return count, found[1] if found else None
