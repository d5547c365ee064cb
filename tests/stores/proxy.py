"""A TCP proxy before a real server, which hangs, resets, refuses, is slow, or cuts an upload in the middle: as told.

A fault holds for the requests whose first line matches ``only``, while ``times`` lasts (None: until another is set).
Requests do not overlap on one connection, so one begins where a chunk of the client's begins with a method.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

_REQUEST = re.compile(rb"(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP")
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


@dataclass
class Fault:
    """``kind``: hang, reset, status (an HTTP ``status``), cut (after ``after`` bytes of a request), slow, deaf, late.

    ``deaf`` lets the server do what is asked and never tells the client; ``late`` has it carried out only ``delay`` after
    ``let_go``, and even if the client has given it up.
    """

    kind: str
    only: bytes = b""
    times: int | None = None
    status: int = 503
    after: int = 1 << 20
    rate: float = 1e6  # bytes a second, of all connections of kind slow together
    seen: threading.Event = field(default_factory=threading.Event)
    delay: float = 0.3  # seconds
    let_go: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)  # by the server, of kind late


class Proxy:
    """Listens on ``endpoint`` and forwards to ``port`` on this machine."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._fault: Fault | None = None
        self.requests: list[str] = []
        self._closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def set(self, fault: Fault | None) -> None:
        """From now on this goes wrong; None: nothing does. Connections that hang are let go."""
        with self._lock:
            self._fault = fault
            hanging, self._open = self._open, set()
        for one in hanging:
            _reset(one)

    def close(self) -> None:
        self._closing.set()
        self._listener.close()
        self.set(None)

    # ------------------------------------------------------------------ connections

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with socket.create_connection(self._target) as server:
                threading.Thread(target=_pump, args=(server, client), daemon=True).start()
                self._forward(client, server)
        except OSError:
            pass  # either side has gone: that is what proxies see
        finally:
            with self._lock:
                self._open.discard(client)
            _reset(client)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        fault: Fault | None = None
        passed = 0
        while data := client.recv(1 << 16):
            if request := _REQUEST.match(data):
                self.requests.append(request[0].decode())
                fault, passed = self._take(request[0]), 0
            if fault is None:
                server.sendall(data)
                continue
            fault.seen.set()
            if fault.kind == "hang":
                self._closing.wait()  # or until ``set`` resets the connection under us
                return
            if fault.kind == "reset":
                return
            if fault.kind == "status":
                self._refuse(client, data, fault.status)
                return
            if fault.kind == "deaf":
                self._whisper(client, data)
                return
            if fault.kind == "late":
                self._hold_back(client, data, fault)
                return
            if fault.kind == "cut" and passed + len(data) > fault.after:
                server.sendall(data[: max(0, fault.after - passed)])
                return
            if fault.kind == "slow":
                time.sleep(len(data) / fault.rate)
            server.sendall(data)
            passed += len(data)

    def _take(self, request: bytes) -> Fault | None:
        with self._lock:
            fault = self._fault
            if fault is None or not re.search(fault.only, request):
                return None
            if fault.times is not None:
                if fault.times == 0:
                    return None
                fault.times -= 1
            return fault

    def _whisper(self, client: socket.socket, data: bytes) -> None:
        """The server hears the request; its answer goes nowhere."""
        with socket.create_connection(self._target) as server:
            server.sendall(data)
            left = _left(data)
            while left > 0 and (more := client.recv(1 << 16)):
                server.sendall(more)
                left -= len(more)
            server.recv(1 << 16)

    def _hold_back(self, client: socket.socket, data: bytes, fault: Fault) -> None:
        left = _left(data)
        while left > 0 and (more := client.recv(1 << 16)):
            data += more
            left -= len(more)
        fault.let_go.wait(30)
        self._closing.wait(fault.delay)
        with socket.create_connection(self._target) as server:
            server.sendall(data)
            answer = server.recv(1 << 16)
            fault.answered.set()
            client.sendall(answer)

    def _refuse(self, client: socket.socket, data: bytes, status: int) -> None:
        left = _left(data)
        while left > 0 and (more := client.recv(1 << 16)):
            left -= len(more)
        client.sendall(
            f"HTTP/1.1 {status} Scripted\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
        )
        client.shutdown(socket.SHUT_WR)
        client.recv(1)


def _left(data: bytes) -> int:
    head, _, body = data.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return (int(length[1]) if length else 0) - len(body)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextlib.contextmanager
def before(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
