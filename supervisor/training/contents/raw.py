"""The files of one checkpoint, opened once each and read at any place. Symbolic links are not followed."""

from __future__ import annotations

import ctypes
import io
import os
from pathlib import Path
from typing import Any

import torch

from supervisor.checkpoint.directory import entry_status
from supervisor.errors import CheckpointError, StorageError


class RawFiles:
    """Raises CheckpointError for a file that is missing, short or none, StorageError for one that cannot be read now."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, int] = {}

    def close(self) -> None:
        """Close them all."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def view(self, name: str, start: int, length: int) -> io.BufferedReader:
        """A range of a file, as a file."""
        return io.BufferedReader(_View(self._descriptor(name), start, length))

    def _descriptor(self, name: str) -> int:
        if name not in self._files:
            entry_status(self.directory, name)
            try:
                self._files[name] = os.open(
                    self.directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
                )
            except OSError as error:
                raise StorageError(f"{self.directory / name}: {error.strerror or error}") from error
        return self._files[name]

    def read(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on."""
        fd = self._descriptor(name)
        while buffer:
            try:
                count = os.preadv(fd, [buffer], offset)
            except OSError as error:
                raise StorageError(f"{self.directory / name}: {error.strerror or error}") from error
            if not count:
                raise CheckpointError(f"{self.directory / name} is truncated")
            buffer = buffer[count:]
            offset += count


class _View(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd = fd
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._fd, [view], self._start + self._at) if view else 0
        self._at += count
        return count


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor; valid as long as the tensor is."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")
