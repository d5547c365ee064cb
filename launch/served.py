"""The server behind ``everstep serve``: a page for each job, its data, and a stream of what has changed (Server-Sent Events).

Whoever opens the printed address brings the token in it, gets a cookie for it and is sent on to an address without it, so that it
stays in no history and no log. Everything else is answered with 401 and one line. Only GET and HEAD exist.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import socketserver
import threading
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import parse_qs, urlsplit

from launch import pages
from supervisor import status as statuses
from supervisor.edge import clock
from supervisor.errors import EverstepError
from supervisor.report import Reporter
from supervisor.status_views import to_json

PERIOD: Final = 1.0  # seconds between two looks at a job
STILL: Final = 15  # looks without news, after which a sign of life is sent
MOST_STREAMS: Final = 64
TIMEOUT: Final = 30.0  # seconds for a client to say what it wants, or to take what it asked for


class Followed:
    """A job that is looked at for any number of readers, one look at a time."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._reporter = Reporter(path)
        self._lock = threading.Lock()

    def status(self) -> tuple[dict[str, Any], str]:
        """``everstep status --json``, and what tells apart one story from the next. Raises JobError."""
        with self._lock:
            found = self._reporter.status(clock.now())
            return to_json(found), self._version(found)

    def document(self) -> tuple[dict[str, Any], str]:
        """The story, and what tells it apart. Raises JobError."""
        with self._lock:
            document = self._reporter.document(clock.now())
            return document, self._version(self._reporter.status(clock.now()))

    def _version(self, found: statuses.Status) -> str:
        return f"{self._reporter.facts}-{int(found.alive)}"


class Server(ThreadingHTTPServer):
    """Serves ``jobs`` to whoever has the ``token``."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, where: tuple[str, int], jobs: list[Followed], token: str) -> None:
        self.jobs, self.token = jobs, token
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        self.ending = threading.Event()
        if ":" in where[0]:
            self.address_family = socket.AF_INET6
        super().__init__(where, Handler)

    def server_bind(self) -> None:
        """As it is, but without asking a name server for our own name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def address(self) -> str:
        """What it listens on."""
        return self.server_name

    @property
    def port(self) -> int:
        """The one that it listens on."""
        return self.server_port

    def server_close(self) -> None:
        """Also end the streams."""
        self.ending.set()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away in mid-answer is no event."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "everstep", ""
    timeout = TIMEOUT

    @property
    def _served(self) -> Server:
        return cast(Server, self.server)

    def do_GET(self) -> None:
        """Answer, if the token is right."""
        parts = urlsplit(self.path)
        tokens = parse_qs(parts.query).get("token", [])
        if tokens and self._is_right(tokens[0]):
            self._send_on(parts.path)
        elif not self._may():
            self._say(
                HTTPStatus.UNAUTHORIZED,
                "everstep: open the address that `everstep serve` printed, with its token",
            )
        else:
            self._route(parts.path)

    do_HEAD = do_GET  # noqa: N815

    def _refuse(self) -> None:
        self.close_connection = True
        self._say(HTTPStatus.METHOD_NOT_ALLOWED, "everstep: read-only", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _route(self, path: str) -> None:
        words = path.strip("/").split("/")
        match words:
            case [""]:
                self._send_on("/job/0/")
            case ["job", number, *rest] if (
                number.isascii() and number.isdigit() and int(number) < len(self._served.jobs)
            ):
                job = int(number)
                if rest == [] and not path.endswith("/"):
                    self._send_on(f"/job/{job}/")
                elif rest == []:
                    self._guarded(self._page, job)
                elif rest == ["data.json"]:
                    self._guarded(self._data, job)
                elif rest == ["events"]:
                    self._events(job)
                else:
                    self._say(HTTPStatus.NOT_FOUND, "everstep: no such page")
            case _:
                self._say(HTTPStatus.NOT_FOUND, "everstep: no such page")

    def _guarded(self, answer: Any, job: int) -> None:
        try:
            answer(job)
        except EverstepError as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, f"everstep: {error}")

    # ------------------------------------------------------------------ answers

    def _page(self, job: int) -> None:
        document, version = self._served.jobs[job].document()
        names = [each.name for each in self._served.jobs]
        page = pages.render(document, live={"jobs": names, "job": job, "version": version})
        self._send(page.encode(), "text/html; charset=utf-8")

    def _data(self, job: int) -> None:
        document, _ = self._served.jobs[job].document()
        self._send(json.dumps(document, allow_nan=False, separators=(",", ":")).encode(), "application/json")

    def _events(self, job: int) -> None:
        if not self._served.streams.acquire(blocking=False):
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, f"everstep: {MOST_STREAMS} readers are here already")
            return
        try:
            self.close_connection = True
            self._head(HTTPStatus.OK, "text/event-stream", None)
            if self.command != "HEAD":
                with contextlib.suppress(OSError):  # it left
                    self._stream(self._served.jobs[job])
        finally:
            self._served.streams.release()

    def _stream(self, job: Followed) -> None:
        last: dict[str, str] = {}
        still = 0
        while not self._served.ending.is_set():
            try:
                status, version = job.status()
                news = {"status": json.dumps(status, allow_nan=False), "story": version}
            except EverstepError as error:
                news = {"trouble": json.dumps(str(error))}
            lines = [
                f"event: {name}\ndata: {text}\n\n" for name, text in news.items() if last.get(name) != text
            ]
            last = news
            still = 0 if lines else still + 1
            if still >= STILL:
                lines, still = [": still here\n\n"], 0
            self.wfile.write("".join(lines).encode())
            self._served.ending.wait(PERIOD)

    # ------------------------------------------------------------------ the token

    def _may(self) -> bool:
        bearer = self.headers.get("Authorization", "")
        if bearer.startswith("Bearer "):
            return self._is_right(bearer.removeprefix("Bearer ").strip())
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and self._is_right(cookie.value)

    def _is_right(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(errors="replace"), self._served.token.encode())

    @property
    def _cookie(self) -> str:
        return f"everstep-{self._served.port}"  # cookies of a host are shared by its ports

    def _send_on(self, path: str) -> None:
        target = path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"
        cookie = f"{self._cookie}={self._served.token}; HttpOnly; SameSite=Strict; Path=/"
        self._head(
            HTTPStatus.SEE_OTHER, "text/plain; charset=utf-8", 0, {"Location": target, "Set-Cookie": cookie}
        )

    # ------------------------------------------------------------------ plain HTTP

    def _say(self, status: HTTPStatus, line: str, headers: dict[str, str] | None = None) -> None:
        self._send(f"{line}\n".encode(), "text/plain; charset=utf-8", status, headers)

    def _send(
        self,
        content: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._head(status, kind, len(content), headers)
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(content)

    def _head(
        self, status: HTTPStatus, kind: str, length: int | None, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", f"{pages.policy(live=True)}; frame-ancestors 'none'")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name that http.server uses)
        """Nothing: the terminal shows the address, and no token."""
