"""Files in memory, in huge pages where the kernel will, and mapped so that these can serve.

A page of 4 KB costs as much to set up as to copy: half a million of them for 2 GB, at each start of a rank. In pages of 2 MB
the same takes microseconds, and to allocate them takes half the time. tmpfs gives them only to hosts that are set up for it
(``shmem_enabled``), but since Linux 6.1 whoever maps a file may ask for them (``MADV_COLLAPSE``), whatever that setting says.
Where the kernel is older, or has no such page free, everything works with small ones.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Final

PAGE: Final = 2 << 20  # bytes of a huge one
_AT_ONCE: Final = 32 << 20  # bytes: the kernel is not asked further once that fails, for it searches long
_MADV_POPULATE_READ: Final = 22  # Linux 5.14
_MADV_COLLAPSE: Final = 25  # Linux 6.1
_PROT_NONE: Final = 0x0
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MAP_POPULATE: Final = 0x8000
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _madvise = _libc.mmap, _libc.munmap, _libc.madvise
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapping:
    """The first ``size`` bytes (at least one) of an open file, from ``address`` on; unmapped with its last user. Raises OSError.

    ``buffer`` holds on to it: tensors and memoryviews are made from that. ``populate``: its pages are set up here, not by the
    first copy.
    """

    def __init__(self, fd: int, size: int, *, writable: bool = False, populate: bool = False) -> None:
        self.size = size
        room = _map(None, size + PAGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        self.address = -(-room // PAGE) * PAGE
        end = self.address + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if self.address > room:
            _munmap(room, self.address - room)
        _munmap(end, room + size + PAGE - end)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_SHARED | _MAP_FIXED | (_MAP_POPULATE if populate else 0)
        try:
            _map(self.address, size, protection, flags, fd)
        except OSError:
            _munmap(self.address, size)
            raise
        self.buffer = (ctypes.c_char * size).from_address(self.address)
        weakref.finalize(self.buffer, _munmap, self.address, size).atexit = False

    def is_readable(self, offset: int, size: int) -> bool:
        """Set up the pages of a part: whether it can be read, without a signal where it cannot. False where the kernel cannot tell."""
        begin = (self.address + offset) // mmap.PAGESIZE * mmap.PAGESIZE
        return bool(_madvise(begin, self.address + offset + size - begin, _MADV_POPULATE_READ) == 0)


def allocate(fd: int, size: int) -> bool:
    """Give an empty file in memory ``size`` bytes of zeros in huge pages; whether it has them. Raises OSError.

    What is less than a page at its end, or could not be had, is a hole.
    """
    os.ftruncate(fd, size)
    mapping, whole = Mapping(fd, size, writable=True), size // PAGE * PAGE
    for begin in range(0, whole, _AT_ONCE):
        end = min(begin + _AT_ONCE, whole)
        for at in range(begin, end, PAGE):
            os.pwrite(fd, b"\0", at)  # what holds nothing at all is left as it is
        if _madvise(mapping.address + begin, end - begin, _MADV_COLLAPSE) != 0:
            return False
    return True


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    found = _mmap(address, size, protection, flags, fd, 0)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
