"""The connection between node supervisors (of ``tcp://``, and of peer copies): both ends prove that they know the job's secret, then every frame proves it again.

    server → client   MAGIC, a nonce S
    client → server   a nonce C, HMAC(secret, MAGIC "client" S C)
    server → client   HMAC(secret, MAGIC "server" S C)

MAGIC names the service, so that what is said to one is of no use to another. The secret itself is never sent. From it and both nonces each direction gets a key of its own, and every frame bears an HMAC over
its number and its content. So nothing that was overheard can be said again, in this connection or another, nothing can be changed,
left out or put in another order, and nothing that one end says can be thrown back at it. What is said is not hidden from who can
listen on the network: it is no secret (addresses, steps, reasons).

Who does not know the secret gets 40 bytes and a few seconds: nothing of what it sends is parsed, and a length is looked at only
after the proof.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Service:
    """What is served: eight bytes for the wire, and what people call it."""

    magic: bytes
    what: str


STORE: Final = Service(b"EVSTORE1", "store")
MAGIC: Final = STORE.magic
NONCE: Final = 32
PROOF: Final = 32
HANDSHAKE: Final = 5.0  # seconds
LIMIT: Final = 64 << 20  # bytes of one frame
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
_LENGTH: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">Q")

Message = dict[str, Any]


class WireError(Exception):
    """The other end is not who it should be, or the connection is broken."""


def encoded(message: Message) -> bytes:
    """The content of a frame: the same for all that it is sent to."""
    return _ENCODER.encode(message).encode()


def decoded(content: bytes) -> Message:
    """What a frame's content says. Raises WireError, ValueError."""
    message = json.loads(content.decode())
    if not isinstance(message, dict):
        raise WireError("no message")
    return message


class GoneError(WireError):
    """The other end has gone without a word: somebody who has changed their mind, no stranger who wants in."""


class Frames:
    """The frames of one connection: both directions have a key, and a number that goes with every frame."""

    def __init__(self, outgoing: bytes, incoming: bytes) -> None:
        self._outgoing, self._incoming = outgoing, incoming
        self._sent = self._received = 0
        self._rest = b""  # of a frame that is not all here

    def seal(self, content: bytes) -> bytes:
        """The next frame to be sent. Raises WireError where it would be too long."""
        if len(content) > LIMIT:
            raise WireError(f"a message of {len(content)} bytes")
        proof = _proof(self._outgoing, self._sent, content)
        self._sent += 1
        return b"".join((_LENGTH.pack(len(content)), content, proof))

    def check(self, content: bytes, proof: bytes) -> bytes:
        """The content of the next frame that was received. Raises WireError where it is not the other end's."""
        if not hmac.compare_digest(proof, _proof(self._incoming, self._received, content)):
            raise WireError("a frame that does not authenticate")
        self._received += 1
        return content

    def take(self, data: bytes) -> Iterator[bytes]:
        """The contents of the frames that are whole with these bytes. Raises WireError."""
        data = self._rest + data if self._rest else data
        at, end = 0, len(data)
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > LIMIT:
                raise WireError(f"a frame of {length} bytes")
            begin = at + _LENGTH.size
            if end - begin < length + PROOF:
                break
            at = begin + length + PROOF
            yield self.check(data[begin : begin + length], data[begin + length : at])
        self._rest = data[at:]


class Wire:
    """An open connection. Not safe for two senders or two receivers at once, but ``send`` never waits."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        outgoing: bytes,
        incoming: bytes,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._frames = Frames(outgoing, incoming)

    def send(self, message: Message) -> None:
        """Hand over one message. Raises WireError when the other end does not take what it was sent."""
        frame = self._frames.seal(encoded(message))
        if self._writer.is_closing() or self._writer.transport.get_write_buffer_size() > LIMIT:
            self._writer.transport.abort()
            raise WireError("the other end does not listen")
        self._writer.write(frame)

    async def receive(self, limit: int = LIMIT) -> Message:
        """The next message, of at most ``limit`` bytes. Raises WireError."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > limit:
                raise WireError(f"a frame of {length} bytes")
            content = await self._reader.readexactly(length)
            proof = await self._reader.readexactly(PROOF)
        except (EOFError, OSError) as error:
            raise WireError(f"the connection broke ({error})") from None
        return decoded(self._frames.check(content, proof))

    def hand_over(self, protocol: asyncio.Protocol) -> tuple[asyncio.Transport, Frames]:
        """From now on ``protocol`` is told what comes: without a task and a buffer for each of thousands of connections.

        To be called when nothing has come since the proof: what the other end sent without waiting for ours is lost to it.
        """
        transport = self._writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.set_protocol(protocol)
        return transport, self._frames

    def pause(self) -> None:
        """Read nothing until ``resume``: what the other end sends waits for the owner of ``socket()``.

        To be called when nothing is on its way: before the message that the other end answers with such bytes.
        """
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def resume(self) -> None:
        """Frames come again."""
        self._writer.transport.resume_reading()  # type: ignore[attr-defined]

    def socket(self) -> socket.socket:
        """The connection itself, for bytes outside the frames, while neither end sends any; to be closed by the caller.

        Raises WireError when it is gone.
        """
        try:
            return socket.socket(fileno=os.dup(self._writer.get_extra_info("socket").fileno()))
        except OSError as error:
            raise WireError(f"the connection broke ({error})") from None

    def close(self) -> None:
        """Close it."""
        self._writer.close()

    @property
    def local_address(self) -> str:
        """This end's address."""
        return str(self._writer.get_extra_info("sockname")[0])


async def accept(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, service: Service = STORE
) -> Wire:
    """The server's side. Raises WireError for who does not know the secret, GoneError for who has not tried."""
    server = os.urandom(NONCE)
    writer.write(service.magic + server)
    try:
        answer = await reader.readexactly(NONCE + PROOF)
    except asyncio.IncompleteReadError as error:
        raise (WireError(f"no proof ({error})") if error.partial else GoneError("it has gone")) from None
    except OSError as error:
        raise GoneError(f"the connection broke ({error})") from None
    client, proof = answer[:NONCE], answer[NONCE:]
    if not hmac.compare_digest(proof, proof_of(secret, service, "client", server, client)):
        raise WireError("the proof is wrong")
    writer.write(proof_of(secret, service, "server", server, client))
    return Wire(reader, writer, *keys_of(secret, server, client))


async def greet(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, service: Service = STORE
) -> Wire:
    """The client's side. Raises WireError for a server that does not know the secret, or does not take ours."""
    magic, another = service.magic, f"another job's {service.what}, or another EVERSTEP_KEY"
    try:
        hello = await reader.readexactly(len(magic) + NONCE)
        if not hello.startswith(magic):
            raise WireError(f"what answers there is no {service.what} of everstep")
        server, client = hello[len(magic) :], os.urandom(NONCE)
        writer.write(client + proof_of(secret, service, "client", server, client))
        proof = await reader.readexactly(PROOF)
    except asyncio.IncompleteReadError:
        raise WireError(f"it has closed the connection: {another}") from None
    except OSError as error:
        raise WireError(f"the connection broke ({error})") from None
    if not hmac.compare_digest(proof, proof_of(secret, service, "server", server, client)):
        raise WireError(f"it does not know the job's secret: {another}")
    theirs, ours = keys_of(secret, server, client)
    return Wire(reader, writer, ours, theirs)


def proof_of(secret: bytes, service: Service, side: str, server: bytes, client: bytes) -> bytes:
    """What a side, "client" or "server", sends to prove that it knows the secret, given both nonces."""
    return _mac(secret, service.magic + side.encode(), server, client)


def keys_of(secret: bytes, server: bytes, client: bytes) -> tuple[bytes, bytes]:
    """Of what the server says, and of what the client says."""
    return _mac(secret, b"from server", server, client), _mac(secret, b"from client", server, client)


def _mac(secret: bytes, label: bytes, server: bytes, client: bytes) -> bytes:
    return hmac.digest(secret, _LENGTH.pack(len(label)) + label + server + client, hashlib.sha256)


def _proof(key: bytes, number: int, content: bytes) -> bytes:
    return hmac.digest(key, _NUMBER.pack(number) + content, "sha256")
