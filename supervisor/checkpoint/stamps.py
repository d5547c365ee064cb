"""What a rank's file in a slot says of itself, in its last 64 bytes: whose it is, of which step, and of which layout.

Whoever writes a slot marks its files as *unfinished* first, and stamps them with the step when all is copied. So a file that was torn,
that is of another step, rank or layout, or lies under another's name, is found by reading 64 bytes of it, where digests of the
whole would cost more than the snapshot. What it does not find is a flipped bit: RAM is trusted that far, and storage is not.

The file of what never changes (number 1) bears neither step nor layout: it is the same in every snapshot, so that checkpoints can share it.
Stock readers never look behind the last archive that the index names.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.errors import CheckpointError

SIZE: Final = 64
UNFINISHED: Final = -1  # in place of the step
CONSTANT: Final = 1  # the number of the file that never changes
NO_LAYOUT: Final = bytes(16)

_MAGIC: Final = b"everstep"
_BODY: Final = struct.Struct("<8sIIq16s")
_SUM: Final = struct.Struct("<I")
_FILL: Final = bytes(SIZE - _BODY.size - _SUM.size)


@dataclass(frozen=True)
class Stamp:
    """``rank`` and ``number`` of the file, ``step`` and ``layout`` of its contents."""

    rank: int
    number: int
    step: int
    layout: bytes = NO_LAYOUT

    def encode(self) -> bytes:
        """The last bytes of the file."""
        constant = self.number == CONSTANT and self.step != UNFINISHED
        step, layout = (0, NO_LAYOUT) if constant else (self.step, self.layout)
        body = _BODY.pack(_MAGIC, self.rank, self.number, step, layout)
        return body + _SUM.pack(zlib.crc32(body)) + _FILL


def read(path: Path, size: int) -> Stamp | None:
    """The stamp of a file of that ``size``; None if it has none. Raises CheckpointError for a damaged one, OSError."""
    if size < SIZE:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        data = os.pread(fd, SIZE, size - SIZE)
    finally:
        os.close(fd)
    if not data.startswith(_MAGIC):
        return None
    body = data[: _BODY.size]
    if data != body + _SUM.pack(zlib.crc32(body)) + _FILL:
        raise CheckpointError(f"{path.name}: its last {SIZE} bytes are damaged")
    _, rank, number, step, layout = _BODY.unpack(body)
    return Stamp(rank, number, step, layout)


def check(name: str, found: Stamp, expected: Stamp) -> None:
    """Raises CheckpointError unless a file is what it should be."""
    if (found.rank, found.number) != (expected.rank, expected.number):
        raise CheckpointError(f"{name}: is file {found.number} of rank {found.rank}")
    if found.step == UNFINISHED:
        raise CheckpointError(f"{name}: was not written to its end")
    if found.number == CONSTANT:
        return
    if found.step != expected.step:
        raise CheckpointError(f"{name}: is of step {found.step}, not {expected.step}")
    if found.layout != expected.layout:
        raise CheckpointError(f"{name}: is of another layout than the other files")
