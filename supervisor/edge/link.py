"""A worker's side of its connection to the node supervisor: one Unix socket, JSON lines, and the control page.

``tell`` is one-way, ``ask`` waits for the answer to that question; nothing arrives unasked, so there is no reader
thread in the worker. Standard library only: this is imported before the user's script is.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from supervisor.edge.control import ControlPage
from supervisor.errors import ProtocolError

RUNTIME: Final = "EVERSTEP_RUNTIME"  # the job's runtime directory on this node (tmpfs)
ATTEMPT: Final = "EVERSTEP_ATTEMPT"
STEP: Final = "EVERSTEP_STEP"  # the step that a Session went on from, set when it is entered
STANDBY: Final = "EVERSTEP_STANDBY"  # which standby this process was launched as; absent: none
WORKER_PID: Final = "EVERSTEP_WORKER_PID"  # the process the link belongs to: not its children


def socket_path(runtime: Path) -> Path:
    """Where the node supervisor listens."""
    return runtime / "socket"


def control_folder(runtime: Path, attempt: int) -> Path:
    """Where the control pages of one attempt lie: two can be alive at once, one of them a standby."""
    return runtime / "control" / str(attempt)


def page_path(runtime: Path, attempt: int, local_rank: int) -> Path:
    """The control page of one local rank."""
    return control_folder(runtime, attempt) / f"rank-{local_rank}"


def stacks_path(runtime: Path, attempt: int, local_rank: int) -> Path:
    """Where one local rank's stacks are written, on request and when it crashes."""
    return control_folder(runtime, attempt) / f"stacks-{local_rank}"


class Link:
    """An open connection; ``page`` is this rank's control page.

    Raises ``OSError`` from the constructor when no supervisor listens in ``runtime``.
    """

    def __init__(
        self, runtime: Path, *, rank: int, local_rank: int, world_size: int, attempt: int, standby: int = 0,
        local_world_size: int | None = None,
    ) -> None:  # fmt: skip
        self.runtime = runtime
        self.rank = rank
        self.local_rank = local_rank
        self.world_size = world_size
        self.attempt = attempt
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.connect(os.fspath(socket_path(runtime)))
        self._buffer = b""
        #: what the boot wants done when the first step has been made, whoever sees it first; harmless when repeated
        self.at_first_step: Callable[[], None] = lambda: None
        self.page = ControlPage(page_path(runtime, attempt, local_rank), create=True)
        #: the supervisor's answer to the greeting, see DESIGN of the message in ``edge/channel.py``
        self.welcome: dict[str, Any] = self.ask(
            "hello", rank=rank, local_rank=local_rank, world_size=world_size, attempt=attempt, standby=standby,
            local_world_size=local_world_size or world_size, pid=os.getpid(),
        )  # fmt: skip

    def tell(self, kind: str, **values: object) -> None:
        """Send one message; a supervisor that is gone is no error (its workers are about to be killed)."""
        line = json.dumps({"kind": kind, **values}).encode() + b"\n"
        with self._lock:
            try:
                self._socket.sendall(line)
            except OSError:
                return

    def ask(self, kind: str, *, deadline: float | None = 600.0, **values: object) -> dict[str, Any]:
        """Send one message and wait up to ``deadline`` seconds (None: as long as it takes) for its answer.

        Raises ProtocolError when the supervisor refuses, is gone, or does not answer in time.
        """
        line = json.dumps({"kind": kind, "ask": True, **values}).encode() + b"\n"
        with self._lock:
            try:
                self._socket.settimeout(deadline)
                self._socket.sendall(line)
                while b"\n" not in self._buffer:
                    chunk = self._socket.recv(65536)
                    if not chunk:
                        raise ProtocolError(f"the supervisor closed the connection before answering {kind!r}")
                    self._buffer += chunk
            except TimeoutError:
                raise ProtocolError(
                    f"no answer from the supervisor to {kind!r} in {deadline or 0:g} s"
                ) from None
            except OSError as error:
                raise ProtocolError(f"the connection to the supervisor broke in {kind!r}: {error}") from error
            finally:
                self._socket.settimeout(None)
            answer, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(answer)
        if "refused" in reply:
            raise ProtocolError(f"the supervisor refused {kind!r}: {reply['refused']}")
        return reply

    def fileno(self) -> int:
        """The socket's descriptor, for whoever hands it on to another program."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket and unmap the page."""
        self._socket.close()
        self.page.close()


_current: Link | None = None
#: called in front of ``current``: a standby that runs its script ahead waits there (``launch/ahead.py``)
in_front_of_current: Callable[[], None] = lambda: None  # noqa: E731


def current(environ: Mapping[str, str] = os.environ) -> Link | None:
    """This process's link, opened by the first call; None without a supervisor and in a worker's children."""
    global _current
    if environ.get(WORKER_PID) != str(os.getpid()):
        return None
    in_front_of_current()
    if _current is None:
        _current = Link(
            Path(environ[RUNTIME]),
            rank=int(environ.get("RANK", "0")),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            world_size=int(environ.get("WORLD_SIZE", "1")),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE") or environ.get("WORLD_SIZE", "1")),
            attempt=int(environ[ATTEMPT]),
            standby=int(environ.get(STANDBY) or 0),
        )
    return _current
