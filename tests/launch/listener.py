"""A stand-in for the node supervisor's socket: answers those who ask and keeps every message, for tests of the boot."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from launch import program as programs
from supervisor.edge import processes
from supervisor.edge.control import ControlPage
from supervisor.edge.link import control_folder, page_path, socket_path
from supervisor.edge.ports import ReservedPort
from supervisor.program import Rendezvous

DEADLINE = 60.0
CLOSED = "closed connection"


class Listener:
    """Listens in ``folder/runtime``; the job directory is ``folder/job``."""

    def __init__(self, folder: Path, attempt: int = 7) -> None:
        self.attempt = attempt
        #: what a greeting is answered with
        self.welcome: dict[str, Any] = {}
        #: whoever asks at the gate is answered once this is set
        self.gate = threading.Event()
        self.runtime = folder / "runtime"
        self.job = folder / "job"
        self.logs = self.job / "attempts" / f"{attempt:06d}" / "logs"
        self.logs.mkdir(parents=True)
        control_folder(self.runtime, attempt).mkdir(parents=True)
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self.seen: list[dict[str, Any]] = []
        self._started: list[int] = []
        self._unread: list[dict[str, Any]] = []
        self._port = ReservedPort()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(os.fspath(socket_path(self.runtime)))
        self._server.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self._port.release()
        for pid in self._started:  # their workers die with them
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def environment(self, **more: str) -> dict[str, str]:
        """What the supervisor would set, on top of this process's own environment."""
        return {
            **os.environ,
            "EVERSTEP_DIR": str(self.job),
            "EVERSTEP_RUN_ID": "cafe0123",
            "EVERSTEP_ATTEMPT": str(self.attempt),
            "EVERSTEP_RUNTIME": str(self.runtime),
            **more,
        }

    def start(self, command: Sequence[str], **more: str) -> int:
        """Start an attempt of the user's ``command`` as the supervisor would; returns the launcher's pid."""
        program = programs.parse(command)
        environment = self.environment(**program.environment, **more)
        argv = program.attempt_argv(Rendezvous(port=self._port.number))
        self._started.append(processes.spawn(argv, environment, self.logs / "torchrun.log"))
        return self._started[-1]

    def page(self, local_rank: int = 0) -> ControlPage:
        return ControlPage(page_path(self.runtime, self.attempt, local_rank))

    def log(self, rank: int = 0) -> str:
        return (self.logs / f"rank-{rank}.log").read_text()

    def expect(self, kind: str, **values: object) -> dict[str, Any]:
        """Wait for a message of this kind with these values; each message answers one call."""
        wanted = {"kind": kind, **values}.items()
        for message in self._unread:
            if all(message.get(name) == value for name, value in wanted):
                self._unread.remove(message)
                return message
        while True:
            message = self.messages.get(timeout=DEADLINE)
            self.seen.append(message)
            if all(message.get(name) == value for name, value in wanted):
                return message
            self._unread.append(message)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        rank = None
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                rank = message.get("rank", rank)
                self.messages.put({**message, "from": rank})
                if message["kind"] == "gate":
                    self.gate.wait(DEADLINE)
                if message.get("ask"):
                    answer = self.welcome if message["kind"] == "hello" else {}
                    with contextlib.suppress(OSError):
                        connection.sendall(json.dumps(answer).encode() + b"\n")
        self.messages.put({"kind": CLOSED, "from": rank})


def wait(pid: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
