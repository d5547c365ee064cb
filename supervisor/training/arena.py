"""An arena: one rank's file in one slot, allocated and touched once, mapped, and written in place ever after.

Fresh pages cost ten times what copying into touched ones does. So the file is allocated in full before anything is
written (a full file system is then an error like any other, not a SIGBUS), in huge pages where they are to be had, and never
truncated while its layout holds. A file that an earlier attempt left is taken over as it is, pages and all.

Pages of tmpfs count as used memory: what this host or its container could not bear is refused like a full file system, and
not found out by the out-of-memory killer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path

import torch

from supervisor.edge import huge, memory, mounts
from supervisor.edge.arenas import MARGIN
from supervisor.training import gpu


class Arena:
    """``path``, ``size`` bytes long and mapped: as ``memory``, a tensor of bytes. Raises OSError."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            present = os.fstat(fd)
            if present.st_size > size:
                os.ftruncate(fd, size)
            missing = size - min(present.st_size, present.st_blocks * 512)
            if missing > 0:
                _check_room(path, size, missing)
                _allocate(fd, path, size)
            mapping = huge.Mapping(fd, size, writable=True, populate=True)
            self._identity = _identity(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        weakref.finalize(self, os.close, fd)
        self._mapping = mapping
        self._bytes = memoryview(mapping.buffer).cast("B")
        self.memory = torch.frombuffer(mapping.buffer, dtype=torch.uint8)
        self.address = mapping.address

    @property
    def is_in_place(self) -> bool:
        """Whether ``path`` still is the file that is mapped."""
        try:
            return _identity(os.stat(self.path, follow_symlinks=False)) == self._identity
        except OSError:
            return False

    def register(self, device: torch.device) -> bool:
        """Have the device copy straight into it; whether it does."""
        return gpu.register(self.address, self.size, self._mapping.buffer, device)

    def put(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        self._bytes[offset : offset + len(data)] = data

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The memory at ``offset`` as a tensor."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        return self.memory[offset : offset + size].view(dtype).view(shape)


def _check_room(path: Path, size: int, missing: int) -> None:
    """Raises OSError when memory for ``missing`` more bytes, and for as large a file of every other rank here, is not to be had.

    What the others have allocated already is not asked for again.
    """
    room = memory.available()
    if room is None or not mounts.is_in_memory(path):
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    others = (ranks - 1) * size - _held_beside(path)
    if missing + max(0, others) > room * (1 - MARGIN):
        raise OSError(
            errno.ENOMEM,
            f"{missing / 1e9:.2f} GB for each of {ranks} ranks are needed, {room / 1e9:.2f} GB of memory are available",
        )


def _held_beside(path: Path) -> int:
    """Bytes that the files of this kind hold which other ranks have in this slot."""
    kind = path.name.rpartition("_")[2]
    with os.scandir(path.parent) as entries:
        files = [entry for entry in entries if entry.name.endswith(f"_{kind}") and entry.name != path.name]
        return sum(file.stat(follow_symlinks=False).st_blocks * 512 for file in files)


def _allocate(fd: int, path: Path, size: int) -> None:
    try:
        if os.fstat(fd).st_blocks == 0 and mounts.is_in_memory(path):
            huge.allocate(fd, size)
        os.posix_fallocate(fd, 0, size)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)  # and give back what there was
        raise


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size
