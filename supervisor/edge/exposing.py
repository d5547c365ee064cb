"""Numbers for whoever collects them: over HTTP, and as a file that is replaced now and then.

Both have threads of their own, so neither a slow reader nor a slow disk holds up anything. ``render`` is called in them.
"""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, cast

from supervisor.errors import ConfigError

PATH: Final = "/metrics"
PERIOD: Final = 15.0  # seconds between two writings of the file
TIMEOUT: Final = 10.0  # seconds for a reader
_LAST: Final = 2.0  # seconds for the last writing

Render = Callable[[], bytes]


class Endpoint(ThreadingHTTPServer):
    """Answers GET /metrics. Raises ConfigError where it cannot listen."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, port: int, render: Render, content_type: str) -> None:
        self.render, self.content_type = render, content_type
        try:
            super().__init__((address, port), _Handler)
        except OSError as error:
            raise ConfigError(f"metrics on {address} port {port}: {error.strerror or error}") from None
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def server_bind(self) -> None:
        """As it is, but without asking a name server for our own name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away in mid-answer is no event."""

    def close(self) -> None:
        """Listen no more."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "everstep", ""
    timeout = TIMEOUT

    def do_GET(self) -> None:
        endpoint = cast(Endpoint, self.server)
        found = self.path.partition("?")[0] == PATH
        content = endpoint.render() if found else f"everstep: metrics are at {PATH}\n".encode()
        self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
        self.send_header("Content-Type", endpoint.content_type if found else "text/plain")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name that http.server uses)
        """Nothing: the terminal is the training's."""


class TextFile:
    """Keeps a file as node_exporter's textfile collector reads them: replaced whole. Raises ConfigError if that cannot be done."""

    def __init__(self, path: Path, render: Render, report: Callable[[str], None]) -> None:
        self._path, self._render, self._report = path, render, report
        self._ending = threading.Event()
        self._refused = False
        try:
            self._write()
        except OSError as error:
            raise ConfigError(f"--metrics-file {path}: {error.strerror or error}") from None
        self._thread = threading.Thread(target=self._keep, name="metrics file", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write it a last time."""
        self._ending.set()
        self._thread.join(_LAST)

    def _keep(self) -> None:
        ending = False
        while not ending:
            ending = self._ending.wait(PERIOD)
            try:
                self._write()
            except OSError as error:
                if not self._refused:
                    self._report(
                        f"--metrics-file {self._path}: {error.strerror or error}; the run goes on without"
                    )
                self._refused = True
            else:
                self._refused = False

    def _write(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(self._render())
            temporary.replace(self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
