"""The node that holds a snapshot: it shows the files, and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from supervisor.edge.peers import pump
from supervisor.edge.peers.protocol import ANSWER, SERVICE, Listing, Shelf
from supervisor.edge.store.door import Door
from supervisor.edge.store.wire import Message, Wire, WireError
from supervisor.edge.threads import in_thread
from supervisor.errors import CheckpointError, PeerError, SnapshotGoneError

REQUEST: Final = 64 << 10  # bytes of a request
LONGEST: Final = 24 * 3600.0  # seconds for one file, whatever the client asks for


class PeerServer:
    """Shows ``shelf``, read-only, to the nodes that know the secret. ``report`` is told of who does not."""

    def __init__(
        self, shelf: Shelf, secret: bytes, report: Callable[[str], None] = lambda _text: None
    ) -> None:
        self._shelf = shelf
        self._door = Door(SERVICE, secret, self._converse, report)

    async def open(self, host: str | None, port: int = 0) -> int:
        """Listen; the port. Raises PeerError where that cannot be."""
        try:
            return await self._door.open(host, port)
        except OSError as error:
            raise PeerError(
                f"cannot serve snapshots to the other nodes at {host or '*'}:{port}: {error.strerror or error}"
            ) from None

    async def close(self) -> None:
        """Serve nobody any more, transfers under way included."""
        await self._door.close()

    async def _converse(self, connection: Wire) -> None:
        try:
            async with asyncio.timeout(ANSWER):
                message = await connection.receive(REQUEST)
            answer = await self._answer(connection, message)
        except TimeoutError:
            return
        except SnapshotGoneError as error:
            answer = {"gone": str(error)}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            answer = {"refused": f"{type(error).__name__}: {error}"}
        connection.send(answer)

    async def _answer(self, connection: Wire, message: Message) -> Message:
        attempt, step, asked = int(message["attempt"]), int(message["step"]), message.get("part")
        part = None if asked is None else (int(asked[0]), int(asked[1]))
        async with asyncio.timeout(ANSWER):
            found = await in_thread(lambda: self._shelf.find(attempt, step, part))
        if found is None:
            raise SnapshotGoneError(f"it holds no snapshot of step {step} of attempt {attempt}")
        match message["op"]:
            case "listing":
                return {"record": found.record, "files": dict(found.files)}
            case "file":
                _check_is(found, message["stamp"])
                name, patience = str(message["name"]), min(float(message["patience"]), LONGEST)
                if name not in found.files:
                    raise ValueError(f"the snapshot of step {step} has no file {name!r}")
                async with asyncio.timeout(patience):
                    return {"digest": await self._send(connection, found, name)}
            case other:
                raise ValueError(f"unknown request {other!r}")

    async def _send(self, connection: Wire, listing: Listing, name: str) -> str:
        """The digest of what was sent. Raises SnapshotGoneError after the last byte, WireError before it: it cannot be said then."""
        size = listing.files[name]
        connection.send({"size": size})
        async with asyncio.timeout(ANSWER):
            await connection.receive(REQUEST)  # "go": so all that was sent has been read

        def look() -> None:
            _check_is(self._shelf.find(listing.attempt, listing.step, listing.part), listing.stamp)

        try:
            digest = await pump.transfer(
                connection, lambda link: pump.push(link, lambda: self._shelf.open(listing, name), size, look)
            )
        except (OSError, CheckpointError, SnapshotGoneError) as error:
            raise WireError(str(error)) from None
        await in_thread(look)
        return digest


def _check_is(found: Listing | None, stamp: object) -> None:
    if found is None or found.stamp != stamp:
        raise SnapshotGoneError("a newer snapshot has taken its place")
