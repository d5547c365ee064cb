"""One bit of a file turned over, and back again.

What was there is noted in a file of its own before anything is touched, so that even a process killed in between leaves
nothing that cannot be mended (``mend_noted``). It is turned back through the descriptor it was turned by: in that very file, wherever it has
been moved since, and only if it is as it was left.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def flipped(file: Path, note: Path) -> Iterator[int]:
    """Turn over one bit in the middle of ``file``; yields where (bytes from its beginning). Raises OSError."""
    fd = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        offset = status.st_size // 2
        whole = os.pread(fd, 1, offset)[0]
        _write(note, {"file": str(file), "inode": status.st_ino, "offset": offset, "whole": whole})
        try:
            _put(fd, offset, whole ^ 1)
            yield offset
        finally:
            _mend(fd, offset, whole)
            note.unlink(missing_ok=True)
    finally:
        os.close(fd)


def mend_noted(note: Path) -> Path | None:
    """Turn back what somebody who was killed has left; the file, or None when nothing was noted. Raises OSError."""
    try:
        noted = json.loads(note.read_text())
        file, inode, offset, whole = (noted[name] for name in ("file", "inode", "offset", "whole"))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    mended = None
    with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
        fd = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_ino == inode and _mend(fd, int(offset), int(whole)):
                mended = Path(file)
        finally:
            os.close(fd)
    note.unlink(missing_ok=True)
    return mended


def _mend(fd: int, offset: int, whole: int) -> bool:
    if os.pread(fd, 1, offset) != bytes([whole ^ 1]):
        return False
    _put(fd, offset, whole)
    return True


def _put(fd: int, offset: int, value: int) -> None:
    os.pwrite(fd, bytes([value]), offset)
    os.fsync(fd)


def _write(note: Path, content: dict[str, object]) -> None:
    with open(note, "w") as handle:
        json.dump(content, handle)
        handle.flush()
        os.fsync(handle.fileno())
