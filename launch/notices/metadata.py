"""Requests to a cloud's metadata service: plain HTTP to an address of the machine's own, each within a known time.

The standard library's client blocks; this one runs in the supervisor's loop. It never goes through a proxy, follows no
redirection, reads a megabyte at most, and whatever goes wrong is a MetadataError.
"""

from __future__ import annotations

import asyncio
import email.utils
import http.client
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from supervisor.edge import clock
from supervisor.errors import ConfigError

ENVIRONMENT: Final = "EVERSTEP_METADATA_URL"
ADDRESS: Final = "http://169.254.169.254"
PATIENCE: Final = 5.0  # seconds
_LONGEST: Final = 1 << 20  # bytes
_DATE_IS_WHOLE: Final = 2.0  # seconds: a Date has no fractions, and some time passes on the way


class MetadataError(Exception):
    """There is no answer, or none that means anything. ``status``: HTTP's, 0 without one; ``retry_after``: seconds."""

    def __init__(self, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer. ``headers`` in lower case; ``skew``: seconds that our clock is ahead of the service's."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    skew: float = 0.0

    @property
    def text(self) -> str:
        """The body, without surrounding space."""
        return self.body.decode(errors="replace").strip()

    def json(self) -> Any:
        """The body's value. Raises MetadataError."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise MetadataError(f"an answer that is no JSON: {self.text[:60]!r}", self.status) from None

    def refused(self) -> MetadataError:
        """What an answer of this status is, where another was needed."""
        after = self.headers.get("retry-after", "")
        return MetadataError(
            f"HTTP status {self.status}", self.status, float(after) if after.isdigit() else 0.0
        )


@dataclass(frozen=True)
class Service:
    """Where it is: ``http://host[:port]``, and how long it may take. Raises ConfigError for anything else."""

    url: str = ADDRESS
    patience: float = PATIENCE

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            wrong = parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.port == 0
        except ValueError:
            wrong = True
        if wrong:
            raise ConfigError(f"{ENVIRONMENT}={self.url}: http://HOST or http://HOST:PORT is required")

    async def ask(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str], body: bytes = b"",
        patience: float | None = None,
    ) -> Reply:  # fmt: skip
        """One request. Raises MetadataError when there is no whole answer within ``patience`` seconds (None: as usual)."""
        patience = self.patience if patience is None else patience
        try:
            async with asyncio.timeout(patience):
                return await self._exchange(path, method, headers, body)
        except TimeoutError:
            raise MetadataError(f"no answer within {patience:g} s") from None
        except OSError as error:
            raise MetadataError(error.strerror or str(error)) from None
        except (
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            http.client.HTTPException,
            ValueError,
        ):
            raise MetadataError("an answer that is no HTTP") from None

    async def _exchange(self, path: str, method: str, headers: Mapping[str, str], body: bytes) -> Reply:
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        reader, writer = await asyncio.open_connection(host, parts.port or 80, limit=_LONGEST)
        try:
            lines = [f"{method} {path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            if method != "GET":
                lines.append(f"Content-Length: {len(body)}")
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            head = await reader.readuntil(b"\r\n\r\n")
            return _reply(head, await _body(reader, head))
        finally:
            writer.transport.abort()


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """What follows the head: as long as it says, or up to the end of the connection."""
    length = _parsed(head, b"").getheader("content-length")
    if length is not None:
        size = int(length)
        if not 0 <= size <= _LONGEST:
            raise ValueError("too long")
        return await reader.readexactly(size)
    content = await reader.read(_LONGEST)
    while len(content) <= _LONGEST and (more := await reader.read(_LONGEST)):
        content += more
    return content


def _reply(head: bytes, body: bytes) -> Reply:
    response = _parsed(head, body)
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(
        status=response.status, headers=headers, body=response.read(), skew=_skew(headers.get("date"))
    )


def _parsed(head: bytes, body: bytes) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(_Received(head + body))  # type: ignore[arg-type]
    response.begin()
    return response


class _Received:
    """Bytes in the place of the socket that ``HTTPResponse`` reads."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, *_: object) -> io.BytesIO:
        """As a socket's."""
        return io.BytesIO(self._content)


def _skew(date: str | None) -> float:
    if date is None:
        return 0.0
    try:
        ahead = clock.now() - email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return 0.0
    return ahead if abs(ahead) > _DATE_IS_WHOLE else 0.0
