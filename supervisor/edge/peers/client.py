"""The node that wants a snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from supervisor.edge import clock
from supervisor.edge.files import Pace, leads_inside
from supervisor.edge.peers import pump
from supervisor.edge.peers.protocol import ANSWER, SERVICE, Listing, Part, Peer
from supervisor.edge.peers.pump import BrokenOffError
from supervisor.edge.store import wire
from supervisor.edge.store.wire import Message, Wire, WireError
from supervisor.errors import PeerError, SnapshotGoneError

#: what the kernel says of a host that does not answer
_NO_WAY: Final = frozenset((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT))


async def is_reached(peer: Peer, patience: float) -> bool:
    """Whether its host takes a connection, or refuses one, in so many seconds: only silence says no."""
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection(peer.host, peer.port)
    except TimeoutError:
        return False
    except OSError as error:
        return error.errno not in _NO_WAY
    try:  # a stranger would be told of
        async with asyncio.timeout(patience):
            await wire.greet(reader, writer, peer.secret, SERVICE)
    except (TimeoutError, WireError, OSError):
        pass  # it is reached, and busy or another one: that is not what was asked
    finally:
        writer.transport.abort()
    return True


async def listing(
    peer: Peer, attempt: int, step: int, part: Part | None = None, *, patience: float = ANSWER
) -> Listing:
    """What the node holds of a step, or its copy of another's ``part``. Raises SnapshotGoneError, PeerError."""
    what = f"step {step} of attempt {attempt}"
    request = {"op": "listing", "attempt": attempt, "step": step, "part": part}
    async with _asking(peer, request, patience, what) as (_, answer):
        files = {str(name): int(size) for name, size in answer["files"].items()}
        if odd := [name for name, size in files.items() if not leads_inside(name) or size < 0]:
            raise PeerError(f"{peer}: {what}: {odd[0]!r} is no file name that can be used")
        return Listing(attempt=attempt, step=step, record=str(answer["record"]), files=files, part=part)


async def fetch(
    peer: Peer,
    listing: Listing,
    name: str,
    destination: Path,
    *,
    patience: float,
    pace: Pace | None = None,
    warm: Path | None = None,
) -> None:
    """Have one file of the snapshot at ``destination``, whole, within ``patience`` seconds; several may be fetched at once.

    ``pace``: all fetches that share it together; the network may be a few megabytes ahead of it. ``warm``: a file of no more
    use, on the same file system, whose pages are written over; it is gone once bytes have come. Raises SnapshotGoneError, PeerError;
    StorageError where it cannot be written. Then nothing is at ``destination`` that was not there before.
    """
    until, what = clock.monotonic() + patience, f"{name} of step {listing.step}"
    request = {
        "op": "file", "attempt": listing.attempt, "step": listing.step, "stamp": listing.stamp, "name": name,
        "patience": patience, "part": listing.part,
    }  # fmt: skip
    size = listing.files[name]
    partial = destination.with_name(f"{destination.name}.{secrets.token_hex(4)}.partial")
    try:
        async with _asking(peer, request, patience, what) as (connection, answer):
            if answer["size"] != size:
                raise WireError(f"it has {answer['size']} bytes there, {size} were listed")
            connection.pause()
            connection.send({"op": "go"})
            digest = await pump.transfer(connection, lambda link: pump.pull(link, size, partial, pace, warm))
            connection.resume()
            async with asyncio.timeout(ANSWER):
                end = await connection.receive()
            _raise_for(end, peer, what)
            if end["digest"] != digest:
                raise WireError("what has arrived is not what was sent")
        with pump.writing(destination):
            partial.rename(destination)
    except BrokenOffError as error:
        await _check_is_there(peer, listing, until - clock.monotonic())
        raise PeerError(f"{peer}: {what}: {error}") from None
    finally:
        with contextlib.suppress(OSError):  # renamed, or could not even be made
            partial.unlink()


async def _check_is_there(peer: Peer, wanted: Listing, patience: float) -> None:
    """Raise SnapshotGoneError if that is why a transfer broke off; a node that does not say so is another matter."""
    try:
        found = await listing(
            peer, wanted.attempt, wanted.step, wanted.part, patience=max(0.0, min(ANSWER, patience))
        )
    except SnapshotGoneError:
        raise
    except PeerError:
        return
    if found.stamp != wanted.stamp:
        raise SnapshotGoneError(f"{peer}: step {wanted.step}: another snapshot has taken its place")


@contextlib.asynccontextmanager
async def _asking(
    peer: Peer, request: Message, patience: float, what: str
) -> AsyncIterator[tuple[Wire, Message]]:
    """The connection, and the answer to the request. What goes wrong in the body is told like what goes wrong here."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(patience):
            async with asyncio.timeout(ANSWER):
                reader, writer = await asyncio.open_connection(peer.host, peer.port)
                connection = await wire.greet(reader, writer, peer.secret, SERVICE)
                connection.send(request)
                answer = await connection.receive()
            _raise_for(answer, peer, what)
            yield connection, answer
    except TimeoutError:
        raise PeerError(f"{peer}: {what}: it has not answered in time") from None
    except BrokenOffError:
        raise
    except WireError as error:
        raise PeerError(f"{peer}: {what}: {error}") from None
    except OSError as error:
        is_known = error.errno is not None and not isinstance(error, socket.gaierror)
        raise PeerError(f"{peer}: {what}: {os.strerror(error.errno or 0) if is_known else error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PeerError(f"{peer}: {what}: an answer that makes no sense ({error!r})") from None
    finally:
        if writer is not None:
            writer.transport.abort()


def _raise_for(answer: Message, peer: Peer, what: str) -> None:
    if "gone" in answer:
        raise SnapshotGoneError(f"{peer}: {what}: {answer['gone']}")
    if "refused" in answer:
        raise PeerError(f"{peer}: {what}: it refuses: {answer['refused']}")
