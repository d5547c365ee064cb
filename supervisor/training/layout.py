"""Archives whose bytes are known before their content: what makes a snapshot a matter of copying.

DCP stores each item as one self-contained ``torch.save`` archive at (file, offset, length). The archive of a *tensor* is a
head, the raw bytes, and a tail, and head and tail depend on nothing but shape and dtype: ``torch.serialization.skip_data``
writes them around a hole. (The checksum in the tail is then zero, which torch does not look at.) So they are written once,
and each later snapshot only fills the hole. The archive of anything else, a *blob*, is a pickle, which grows and shrinks: it
is padded inside, behind the pickle's end, where no unpickler reads on, so that the archive always has the length that the
index says.

Stock readers see ordinary archives.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import re
import struct
import types
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.serialization import skip_data

_ALIGNMENT: Final = 64
_LONGEST_COMMENT: Final = 0xFFFF  # bytes, of a zip archive
_CHECKSUMS: Final = 3  # of a file in a zip archive: in its head, behind it, and in the directory


class OutgrownError(Exception):
    """A blob does not fit into the place that was laid out for it."""


@dataclass(frozen=True)
class Archive:
    """The archive of a contiguous tensor: ``head``, then ``payload`` bytes of data, then ``tail``."""

    head: bytes
    payload: int
    tail: bytes

    @property
    def length(self) -> int:
        """Of the whole archive, in bytes."""
        return len(self.head) + self.payload + len(self.tail)


_SCALARS: Final = frozenset({bool, int, float, complex, str, bytes, type(None)})


def is_plain(value: object) -> bool:
    """Whether it is made of Python's own values and containers alone, which pickle alike and at once."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is list or kind is tuple:
        return all(map(is_plain, value))  # type: ignore[call-overload]
    if kind is dict:
        items: Any = value
        return all(map(is_plain, items)) and all(map(is_plain, items.values()))
    return False


class PlainBlobs:
    """Archives of plain values for one room, without torch: all but the pickle is as in the first one.

    ``torch.save`` opens an archive writer and asks every object of the pickle whether it is a tensor. Here the pickle is
    put into the archive that was made so before, and its checksum where the former one was.
    """

    def __init__(self, room: Room, data: bytes, pickled: bytes) -> None:
        """``data`` is the archive of the value that is ``pickled``. Raises ValueError for one that is laid out otherwise."""
        self._room = room
        padded = pickled.ljust(room.pickle, b"\0")
        self._begin = data.index(padded)
        self._end = self._begin + room.pickle
        checksum = _checksum(padded)
        self._checksums = [
            match.start()
            for match in re.finditer(re.escape(checksum), data)
            if not self._begin - 4 < match.start() < self._end
        ]
        if len(data) != room.length or data.count(padded) != 1 or not 1 <= len(self._checksums) <= _CHECKSUMS:
            raise ValueError("this version of torch lays archives out in another way")
        self._template = data

    def check(self, pickled: bytes) -> None:
        """Raises OutgrownError when it does not fit."""
        if len(pickled) > self._room.pickle:
            raise OutgrownError

    def archive(self, pickled: bytes) -> bytes:
        """The archive. Raises OutgrownError when it does not fit."""
        self.check(pickled)
        data = bytearray(self._template)
        data[self._begin : self._end] = padded = pickled.ljust(self._room.pickle, b"\0")
        checksum = _checksum(padded)
        for at in self._checksums:
            data[at : at + 4] = checksum
        return bytes(data)


def pickled(value: object) -> bytes:
    """A plain value as ``torch.save`` pickles it."""
    return pickle.dumps(value, protocol=2)


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))


@functools.lru_cache(maxsize=1 << 14)
def tensor_archive(shape: tuple[int, ...], dtype: torch.dtype) -> Archive | None:
    """The archive of any contiguous tensor of this shape and dtype; None where its bytes cannot be told beforehand."""
    try:
        return _tensor_archive(shape, dtype)
    except RuntimeError:  # no such tensor here, or a torch that writes otherwise
        return None


def _tensor_archive(shape: tuple[int, ...], dtype: torch.dtype) -> Archive:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ComplexHalf")
        # its memory is never touched; ``empty`` of the shape would fill it where algorithms must be deterministic
        tensor: Any = torch.empty(0, dtype=dtype, device="cpu")
        payload = math.prod(shape) * tensor.element_size()
        storage: Any = torch.UntypedStorage
        tensor.set_(storage(payload, device="cpu"), 0, shape)
    if payload == 0:
        whole = io.BytesIO()
        torch.save(tensor, whole)
        return Archive(whole.getvalue(), 0, b"")
    sparse = _Sparse()
    with skip_data():
        torch.save(tensor, sparse)  # type: ignore[arg-type]
    return sparse.around(payload)


def aligned(offset: int, head: int) -> int:
    """The first place at or after ``offset`` where an archive with a ``head`` of that length has an aligned payload."""
    return -(-(offset + head) // _ALIGNMENT) * _ALIGNMENT - head


@dataclass(frozen=True)
class Room:
    """The place laid out for a blob: the pickle is padded to ``pickle`` bytes, the archive to ``length``."""

    pickle: int
    length: int


def new_blob(value: Any) -> tuple[bytes, Room]:
    """The archive of ``value`` with room to grow by half, and that room."""
    data, room = _save(value, None)
    return data, Room(room, len(data))


def blob(value: Any, room: Room) -> bytes:
    """The archive of ``value``, exactly as long as its room. Raises OutgrownError when it does not fit."""
    data, _ = _save(value, room.pickle)
    if not 0 <= (rest := room.length - len(data)) <= _LONGEST_COMMENT:
        raise OutgrownError
    return data if rest == 0 else data[:-2] + struct.pack("<H", rest) + bytes(rest)


class _Padding(pickle.Pickler):
    """Pads what it pickled to the room there is, or makes room."""

    def __init__(self, file: Any, room: _Wanted, **options: Any) -> None:
        super().__init__(file, **options)
        self._file = file
        self._room = room

    def dump(self, obj: Any) -> None:
        super().dump(obj)
        size = self._file.tell()
        if self._room.size is None:
            self._room.size = -(-(size + max(512, size // 2)) // _ALIGNMENT) * _ALIGNMENT
        if size > self._room.size:
            raise OutgrownError
        self._file.write(bytes(self._room.size - size))


@dataclass
class _Wanted:
    size: int | None


def _save(value: Any, room: int | None) -> tuple[bytes, int]:
    wanted = _Wanted(room)

    class Pickler(_Padding):  # torch derives from it
        def __init__(self, file: Any, **options: Any) -> None:
            super().__init__(file, wanted, **options)

    file = io.BytesIO()
    torch.save(value, file, pickle_module=types.SimpleNamespace(Pickler=Pickler, __name__="pickle"))
    assert wanted.size is not None
    return file.getvalue(), wanted.size


class _Sparse(io.RawIOBase):
    """A file that keeps what was written, and not what was skipped."""

    def __init__(self) -> None:
        self._at = 0
        self._writes: list[tuple[int, bytes]] = []

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = max((at + len(data) for at, data in self._writes), default=0)
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence]
        return self._at

    def write(self, data: Any) -> int:
        copied = bytes(data)
        self._writes.append((self._at, copied))
        self._at += len(copied)
        return len(copied)

    def around(self, payload: int) -> Archive:
        """What lies before and behind the one hole, which must be ``payload`` bytes long."""
        parts = [bytearray()]
        position = 0
        for at, data in sorted(self._writes):
            if at != position:
                parts.append(bytearray())
                if len(parts) > 2 or at - position != payload:
                    raise RuntimeError("this version of torch lays archives out in another way")
            parts[-1] += data
            position = at + len(data)
        head, tail = parts
        return Archive(bytes(head), payload, bytes(tail))
