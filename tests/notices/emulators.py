"""The metadata services of three clouds, as their vendors document them: paths, headers, codes, bodies, and what goes wrong.

Each runs in a thread with a loop of its own, so that a job in another process can be told something by a test. ``faults``
are served first, one for each request: a status (401, 429, 503, …), ``hang``, ``garbage``, ``cut`` (less than promised),
``close`` (no answer at all), ``drip`` (a byte now and then). ``skew`` is by how much the service's clock is ahead of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import email.utils
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

CLONE_NEWNET = 0x40000000
Fault = int | str
Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Asked:
    """One request. Header names in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


def enter(process: int) -> None:
    """Have the network of a process from now on, in this thread alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{process}/ns/net") as network:
        if libc.setns(network.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


@dataclass
class Emulator:
    """A service on a port of its own: subclasses say what it answers."""

    skew: float = 0.0
    faults: deque[Fault] = field(default_factory=deque)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    server_header = "Server"

    async def answer(self, asked: Asked) -> Answer:
        raise NotImplementedError

    @contextlib.contextmanager
    def serving(self, network: int | None = None) -> Iterator[None]:
        """Answer requests until the block is left; ``network``: only those on that process's network."""
        ready, loop = threading.Event(), asyncio.new_event_loop()
        self.loop = loop
        self.changed = asyncio.Event()

        async def serve() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            self.over = asyncio.Event()
            ready.set()
            await self.over.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        def run() -> None:
            if network is not None:
                enter(network)
            loop.run_until_complete(serve())
            loop.run_until_complete(asyncio.sleep(0))  # what was cancelled ends
            loop.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield
        finally:
            loop.call_soon_threadsafe(self.over.set)
            thread.join(30)

    def notify(self) -> None:
        """Something has changed: whoever waits for that looks again."""
        self.loop.call_soon_threadsafe(self._changed)

    def _changed(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._exchange(reader, writer)
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines) if name}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        parts = urlsplit(target)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        asked = Asked(method, parts.path, query, headers, body)
        self.asked.append(asked)
        fault = self.faults.popleft() if self.faults else None
        if fault == "hang":
            await self.over.wait()
        elif fault == "garbage":
            writer.write(b"\x00\xff what is this\r\n\r\n")
        elif fault == "cut":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        elif fault == "drip":
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" * 1000:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)
        elif isinstance(fault, int):
            extra = {"Retry-After": "7"} if fault in (429, 503) else {}
            self._write(writer, (fault, extra, b"it is not to be"))
        elif fault != "close":
            self._write(writer, await self.answer(asked))
        await writer.drain()

    def _write(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        status, headers, body = answer
        date = email.utils.formatdate(time.time() + self.skew, usegmt=True)
        lines = {"Date": date, "Server": self.server_header, "Content-Length": str(len(body)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n".encode() + body)

    def now(self) -> float:
        return time.time() + self.skew


@dataclass
class AwsEmulator(Emulator):
    """IMDSv2: tokens by PUT; without one 401, for what is not there 404."""

    spot: tuple[str, float] | None = None  # action, seconds from now when it was set
    rebalance: bool = False
    scheduled: list[dict[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    server_header = "EC2ws"

    async def answer(self, asked: Asked) -> Answer:
        if asked.path == "/latest/api/token":
            return self._token(asked)
        if asked.headers.get("x-aws-ec2-metadata-token") not in self.tokens:
            return 401, {"Content-Type": "text/html"}, b"<html>401 - Unauthorized</html>"
        if asked.path == "/latest/meta-data/spot/instance-action" and self.spot is not None:
            action, end = self.spot
            at = datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return self._json({"action": action, "time": at})
        if asked.path == "/latest/meta-data/events/recommendations/rebalance" and self.rebalance:
            return self._json({"noticeTime": "2026-11-25T08:22:00Z"})
        if asked.path == "/latest/meta-data/events/maintenance/scheduled":
            return self._json(self.scheduled)
        return 404, {"Content-Type": "text/html"}, b"<?xml version='1.0'?><html>404 - Not Found</html>"

    def _token(self, asked: Asked) -> Answer:
        lifetime = asked.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if asked.method != "PUT":
            return 405, {"Allow": "OPTIONS, PUT"}, b""
        if "x-forwarded-for" in asked.headers:
            return 403, {}, b""
        if not lifetime.isdigit() or not 1 <= int(lifetime) <= 21600:
            return 400, {}, b""
        token = f"AQAEA{len(self.tokens):032d}=="
        self.tokens.add(token)
        return 200, {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": lifetime}, token.encode()

    def interrupt(self, action: str = "terminate", seconds: float = 120.0) -> None:
        self.spot = action, self.now() + seconds

    def schedule(
        self, code: str, seconds: float, state: str = "active", event: str = "instance-event-0"
    ) -> None:
        at = datetime.fromtimestamp(self.now() + seconds, UTC).strftime("%d %b %Y %H:%M:%S GMT")
        self.scheduled = [
            {"Code": code, "NotBefore": at, "NotAfter": at, "EventId": event, "State": state, "Description": "x"}
        ]  # fmt: skip

    @staticmethod
    def _json(value: object) -> Answer:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@dataclass
class GcpEmulator(Emulator):
    """Values with an ETag each; ``wait_for_change`` keeps the request until it is another, or for ``timeout_sec``."""

    values: dict[str, str] = field(
        default_factory=lambda: {"preempted": "FALSE", "maintenance-event": "NONE"}
    )
    waits: bool = True

    server_header = "Metadata Server for VM"

    async def answer(self, asked: Asked) -> Answer:
        if asked.headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in asked.headers:
            return 403, {}, b"Missing Metadata-Flavor:Google header."
        root, _, key = asked.path.rpartition("/")
        if root != "/computeMetadata/v1/instance" or key not in self.values:
            return 404, {}, b""
        if asked.query.get("wait_for_change") == "true" and self.waits:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(float(asked.query.get("timeout_sec", "3600"))):
                    while asked.query.get("last_etag") == self.etag(key):
                        await self.changed.wait()
        headers = {
            "Metadata-Flavor": "Google",
            "ETag": self.etag(key),
            "Content-Type": "application/text",
            "X-XSS-Protection": "0",
        }
        return 200, headers, self.values[key].encode()

    def etag(self, key: str) -> str:
        return f"{abs(hash((key, self.values[key]))):016x}"

    def set(self, key: str, value: str) -> None:
        self.values[key] = value
        self.notify()


@dataclass
class AzureEmulator(Emulator):
    """Scheduled events of a set of machines; a StartRequest begins one."""

    name: str = "trainer_0"
    events: list[dict[str, object]] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    server_header = "Microsoft-IIS/10.0"

    async def answer(self, asked: Asked) -> Answer:
        if asked.headers.get("metadata", "").lower() != "true":
            return self._error("Bad request. Required metadata header not specified")
        if "api-version" not in asked.query:
            return self._error("Bad request. api-version was not specified in the request")
        if asked.path == "/metadata/instance/compute/name" and asked.query.get("format") == "text":
            return 200, {"Content-Type": "text/plain; charset=utf-8"}, self.name.encode()
        if asked.path != "/metadata/scheduledevents":
            return 404, {}, b""
        if asked.method == "POST":
            return self._start(asked)
        document = {"DocumentIncarnation": len(self.asked), "Events": self.events}
        return 200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(document).encode()

    def _start(self, asked: Asked) -> Answer:
        known = {event["EventId"] for event in self.events}
        for request in json.loads(asked.body)["StartRequests"]:
            if request["EventId"] not in known:
                return self._error("Bad request. Event was not found")
            self.started.append(request["EventId"])
        return 200, {}, b""

    def schedule(
        self, kind: str, seconds: float | None, *, status: str = "Scheduled",
        resources: tuple[str, ...] = (), event: str = "602d9444-d2cd-49c7-8624-8643e7171297",
    ) -> None:  # fmt: skip
        at = "" if seconds is None else email.utils.formatdate(self.now() + seconds, usegmt=True)
        self.events = [
            {
                "EventId": event, "EventStatus": status, "EventType": kind, "ResourceType": "VirtualMachine",
                "Resources": list(resources or (self.name,)), "NotBefore": at, "Description": "",
                "EventSource": "Platform", "DurationInSeconds": -1,
            }
        ]  # fmt: skip

    @staticmethod
    def _error(text: str) -> Answer:
        return 400, {"Content-Type": "application/json"}, json.dumps({"error": text}).encode()
