"""A small supervisor for tests: speaks the worker's protocol over a real socket, does what it is told, keeps what it hears."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervisor.decide.savepoint import word
from supervisor.edge.control import ControlPage, Word
from supervisor.edge.link import control_folder, page_path, socket_path
from supervisor.model import ProposalFlag, ProposalState

DEADLINE = 60.0
ATTEMPT = 3


class Station:
    """Serves ``world`` ranks out of ``runtime``; three slots, a new one offered when every rank has saved."""

    def __init__(
        self, runtime: Path, world: int, *, every: tuple[int, ...] = (), resume: tuple[Path, int] | None = None,
        propose_on_request: bool = True, keep: Path | None = None,
    ) -> None:  # fmt: skip
        self.runtime = runtime
        self.world = world
        self.heard: list[dict[str, Any]] = []
        self._every, self._resume, self._on_request = every, resume, propose_on_request
        self._pages: dict[int, ControlPage] = {}
        self._saved: dict[int, set[int]] = {}
        self._slot = 0
        self._failed = 0
        self._serial = 0
        self._keep = keep
        self.newest: tuple[Path, int] | None = None  # slot and step of the newest complete snapshot
        self._news = threading.Condition()
        control_folder(runtime, ATTEMPT).mkdir(parents=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(socket_path(runtime)))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def environ(self) -> dict[str, str]:
        return {"EVERSTEP_RUNTIME": str(self.runtime), "EVERSTEP_ATTEMPT": str(ATTEMPT)}

    def slot(self, index: int) -> Path:
        return self.runtime / "slots" / str(index)

    def page(self, rank: int) -> ControlPage:
        return self._pages[rank]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        with self._news:
            return [message for message in self.heard if message["kind"] == kind]

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Until ``what`` is true; asked at every message, and now and then."""
        end = time.monotonic() + DEADLINE
        with self._news:
            while not what():
                if time.monotonic() > end:
                    raise TimeoutError(f"heard only {self.heard}")
                self._news.wait(0.01)

    def propose(self, step: int, flags: ProposalFlag, state: ProposalState = ProposalState.COMMITTED) -> None:
        self._serial += 1
        for page in self._pages.values():
            page[Word.PROPOSAL_STEP] = step
            page[Word.PROPOSAL_FLAGS] = flags
            page[Word.PROPOSAL] = word(self._serial, ProposalState.PROPOSED)
        if state is not ProposalState.PROPOSED:
            self.judge(state)

    def judge(self, state: ProposalState) -> None:
        for page in self._pages.values():
            page[Word.PROPOSAL] = word(self._serial, state)

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection.makefile("rwb") as stream:
            for line in stream:
                message = json.loads(line)
                with self._news:
                    answer = self._hear(message)
                    self.heard.append(message)
                    self._news.notify_all()
                if answer is not None:
                    stream.write(json.dumps(answer).encode() + b"\n")
                    stream.flush()

    def _offer_next(self) -> None:
        self._slot = (self._slot + 1) % 3
        for page in self._pages.values():
            page[Word.FREE_SLOT] = self._slot + 1

    def _hear(self, message: dict[str, Any]) -> dict[str, Any] | None:
        kind = message["kind"]
        if kind == "hello":
            page = ControlPage(page_path(self.runtime, ATTEMPT, message["local_rank"]))
            page[Word.FREE_SLOT] = self._slot + 1
            self._pages[message["rank"]] = page
            return {"save_every_steps": list(self._every)}
        if kind == "resume":
            path, step = self._resume or (None, 0)
            return {
                "path": None if path is None else str(path),
                "step": step,
                "tier": None if path is None else "ram",
            }
        if kind == "saved":
            ranks = self._saved.setdefault(message["step"], set())
            ranks.add(len(ranks))
            if len(ranks) == self.world:
                self.newest = self.slot(message["slot"]), message["step"]
                if self._keep is not None:
                    shutil.copytree(self.newest[0], self._keep / str(message["step"]))
                self._offer_next()
        if kind == "save_failed" and message.get("torn"):
            self._offer_next()
        elif kind == "save_failed":
            self._failed += 1
            if self._failed % self.world == 0:
                self._offer_next()
        if kind == "request" and self._on_request:
            self._on_request = False  # the other ranks ask for the same
            self.propose(message["step"], ProposalFlag.CHECKPOINT)
        return None
