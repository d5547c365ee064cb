"""The bytes of a file, outside the frames, in a thread on either side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from blake3 import blake3

from supervisor.edge.files import Pace
from supervisor.edge.store.wire import Wire, WireError
from supervisor.edge.threads import in_thread
from supervisor.errors import StorageError

STALL: Final = 15.0  # seconds without a byte after which the other end counts as dead
LEAVING: Final = 5.0  # seconds that a thread may take to notice that it is not wanted any more
CHUNK: Final = 1 << 20  # bytes: stays in the cache between read, hash and write
LOOK: Final = 64  # chunks after which the server looks whether the snapshot still is there

T = TypeVar("T")


class BrokenOffError(WireError):
    """The connection ended among the bytes of a file."""


@dataclass(frozen=True)
class Link:
    """The connection as a thread sees it. ``unwanted`` is set when nobody waits for the thread any more."""

    socket: socket.socket
    unwanted: threading.Event


async def transfer(connection: Wire, work: Callable[[Link], T]) -> T:
    """Do ``work`` with the connection, in a thread. Cancelled, the connection is dead, and the thread ends within moments."""
    link = Link(connection.socket(), threading.Event())

    def run() -> T:
        with link.socket:
            link.socket.settimeout(STALL)
            return work(link)

    thread = asyncio.ensure_future(in_thread(run))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        link.unwanted.set()
        with contextlib.suppress(OSError):
            link.socket.shutdown(socket.SHUT_RDWR)
        await asyncio.wait({thread}, timeout=LEAVING)
        if not thread.cancel():
            thread.exception()  # nobody asks for it
        raise


def push(link: Link, opened: Callable[[], int], size: int, look: Callable[[], None]) -> str:
    """Send a file of ``size`` bytes; their digest. Raises OSError, WireError, and what ``look`` raises now and then."""
    hasher, buffer, sent, next_look = blake3(), memoryview(bytearray(min(CHUNK, size))), 0, 0
    fd = opened()
    try:
        while sent < size:
            if sent >= next_look:
                look()
                next_look += LOOK * CHUNK
            count = os.preadv(fd, [buffer[: size - sent]], sent)
            if not count:
                raise WireError(f"the file ends after {sent} of {size} bytes")
            hasher.update(buffer[:count])
            sent += count
            taken = 0
            while taken < count:
                taken += link.socket.send(buffer[taken:count])
    finally:
        os.close(fd)
    return str(hasher.hexdigest())


def pull(link: Link, size: int, partial: Path, pace: Pace | None, warm: Path | None) -> str:
    """Write the ``size`` bytes that come; their digest. Raises StorageError, BrokenOffError."""
    hasher, got = blake3(), 0
    buffer = memoryview(bytearray(min(CHUNK, size, pace.piece if pace else size)))
    with writing(partial):
        fd = _opened(partial, size, warm)
    try:
        while got < size:
            try:
                count = link.socket.recv_into(buffer[: size - got])
            except TimeoutError:
                raise BrokenOffError(f"nothing came for {STALL:g} s, after {got} of {size} bytes") from None
            except OSError as error:
                raise BrokenOffError(f"it broke off after {got} of {size} bytes ({error})") from None
            if not count:
                raise BrokenOffError(f"it broke off after {got} of {size} bytes")
            hasher.update(buffer[:count])
            with writing(partial):
                written = 0
                while written < count:
                    written += os.pwrite(fd, buffer[written:count], got + written)
            got += count
            if link.unwanted.wait(max(0.0, pace.spend(count)) if pace else 0.0):
                raise BrokenOffError("nobody waits for it any more")  # though there may be more to be read
    finally:
        os.close(fd)
    return str(hasher.hexdigest())


def _opened(partial: Path, size: int, warm: Path | None) -> int:
    partial.parent.mkdir(parents=True, exist_ok=True)
    if warm is not None:
        with contextlib.suppress(OSError):  # then with fresh pages
            status = warm.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                warm.rename(partial)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fstat(fd).st_size > size:
        os.ftruncate(fd, size)
    return fd


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong here is this node's own storage: StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"writing {error.filename or path} failed: {error.strerror or error}") from None
