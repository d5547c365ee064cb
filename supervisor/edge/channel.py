"""The node supervisor's Unix socket: JSON lines from its workers, answers to those that ask.

Only processes of the same user (by the kernel's peer credentials) are heard. A message is one JSON object a line with a
``kind``; one with ``ask`` gets an answer: what the handler returns, or why it was refused. Nothing else is ever sent, so a
worker never takes one answer for another. An answer may take its time (``resume`` waits for a verification) without
holding up the other workers.

Kinds and fields, worker → supervisor (``?``: answered):

====================  ==================================================================================
hello?                rank, local_rank, world_size, local_world_size, attempt, standby, pid → the save points every
                      rank knows by itself; to a standby also what to import ahead
gate?                 cuda, where, read: a standby waits (in front of what, having read which files) → when it begins
imported              names, beyond: what the script has imported so far and a standby may import ahead; stopped_by: what
                      has kept torch from being among them
session               total_steps: a Session was opened
resume?               → path, step, tier: where to resume, the same answer to all ranks of an attempt; on_demand: what is
                      read there has to be asked for; skips: steps that are left out
need?                 files: ranges by name → once they can be read; problem, damaged: why they cannot
resumed               step, seconds
rejected              path, reason, damaged: the rank could not load what it was told to
saved, save_failed    step, slot, seconds, bytes, metrics; step, slot, reason
request, waiting      step: save() was called; the rank stands at the proposed step
metrics               step, values
trouble               finding, metric, step, value, usual, good, batches: numbers have gone wrong (``decide/guard.py``)
closed                step, completed: the Session's loop was left
raised, exiting       type, message, traceback, bases, step; code
left                  a worker that fails has run all of the script's exit handlers
====================  ==================================================================================
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.errors import EverstepError

LINE_LIMIT = 4 << 20  # bytes; a traceback can be long
CLOSE_PATIENCE = 1.0  # seconds for answers under way

Message = dict[str, Any]


@dataclass(eq=False)
class Peer:
    """One connected worker process, as the kernel vouches for it."""

    pid: int
    #: set by the handler of ``hello``
    seat: Any = None


Handler = Callable[[Peer, Message], Awaitable[Message | None]]


class Channel:
    """The listening socket. ``handler`` is called for each message; an exception in it refuses that message."""

    def __init__(self, path: Path, handler: Handler, report: Callable[[str], None] = lambda _: None) -> None:
        self.path = path
        self._handler = handler
        self._report = report
        self._server: asyncio.Server | None = None
        self._peers: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Listen; a stale socket file of a dead supervisor is replaced (the job's lock makes that safe)."""
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, os.fspath(self.path), limit=LINE_LIMIT)
        os.chmod(self.path, 0o600)

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._peers.values())
        for writer in list(self._peers):
            writer.close()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_PATIENCE)
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("3i", raw)
        if uid != os.geteuid():
            writer.close()
            return
        peer = Peer(pid)
        task = asyncio.current_task()
        assert task is not None
        self._peers[writer] = task
        try:
            while line := await reader.readline():
                answer = await self._handle(peer, line)
                if answer is not None:
                    writer.write(json.dumps(answer).encode() + b"\n")
        except (ConnectionError, ValueError):  # ValueError: a line over the limit
            return
        finally:
            del self._peers[writer]
            writer.close()

    async def _handle(self, peer: Peer, line: bytes) -> Message | None:
        message: Any = None
        try:
            message = json.loads(line)
            if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
                raise TypeError("not a message")
            answer = await self._handler(peer, message)
            return (answer or {}) if message.get("ask") else None
        except (
            KeyError,
            TypeError,
            ValueError,
            EverstepError,
            OSError,
        ) as error:  # never the connection's end
            refused = f"{type(error).__name__}: {error}"
        if isinstance(message, dict) and message.get("ask"):
            return {"refused": refused}
        self._report(
            f"a message of pid {peer.pid} was refused ({refused}): {line[:200].decode(errors='replace')}"
        )
        return None
