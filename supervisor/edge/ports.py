"""A TCP port for the next attempt's rendezvous that nobody else can be given meanwhile."""

from __future__ import annotations

import socket


class ReservedPort:
    """A free port, held until ``release``.

    The placeholder is bound with SO_REUSEADDR and never listens, so the attempt's own store (which sets the same
    option) may bind the port, while the kernel hands it to no one who asks for any port.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        self.number: int = self._socket.getsockname()[1]

    def release(self) -> None:
        """Give the port back."""
        self._socket.close()
