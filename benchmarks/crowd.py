"""Thousands of node supervisors in one process, as the store and the leader see them: for ``scale.py``.

Each has a connection of its own to the real store, proves that it knows the secret, holds a lease and renews it, reports, watches the order,
and does its part of every save. What they have in common is done once: an order is parsed when the first of them gets it, reports are filled
into one prepared text. One selector serves all. So what is measured beside the leader is little more than the sockets of its nodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from supervisor.decide.fencing import RENEWALS
from supervisor.edge import plain
from supervisor.edge.store import wire
from supervisor.edge.store.wire import Frames
from supervisor.fleet import Answer, Course, Report, Saved
from supervisor.hand import REPORTS, STEPS_PERIOD
from supervisor.papers import encoded

HOST = "127.0.0.1"
CONTENTS = 64


@dataclass(frozen=True, kw_only=True)
class Ordered:
    """What of an order concerns them; the leader waits for all of it."""

    serial: int = 0
    answer: int = 0  # the serial of the proposal that they have confirmed
    committed: int = 0
    prepared: int = 0
    slot: int = -1
    saved: int = 0  # the step of the newest save
    steps: int = 0


class Crowd:
    """``count`` nodes, of ``total`` in all processes, that join one after the other."""

    def __init__(self, first: int, count: int, total: int, port: int, secret: bytes, lease: float) -> None:
        self._lease, self._secret, self._port = lease, secret, port
        self._names = [f"n{number:05d}" for number in range(first, first + count)]
        self._lives = [secrets.token_hex(8) for _ in self._names]
        self._sockets: list[socket.socket] = []
        self._frames: list[Frames] = []
        self._leases: list[int] = []
        self._told: list[Ordered] = []
        self._known: list[Ordered] = []
        self._poll = select.epoll()
        self._by_fd: dict[int, int] = {}
        self._renewed: list[float] = []
        self._reported: list[float] = []
        self._pace = max(STEPS_PERIOD, total / REPORTS)
        self._ordered = Ordered()
        self._contents: dict[bytes, Ordered] = {}  # what was sent to some node already
        self.sent = self.received = 0  # frames
        self.seen = 0  # verdicts on the newest proposal
        self.last = 0.0  # when the last of them came
        _check()

    def serve(self, pipe: Connection) -> None:
        """Until the process is killed. Sends ("verdict", serial, when) for each that all have, and its counts when asked."""
        self._poll.register(pipe.fileno(), select.EPOLLIN)
        joined, told, swept = 0, 0, 0.0
        while True:
            if joined < len(self._names):
                self._join(self._names[joined])
                joined += 1
            for fd, _ in self._poll.poll(0 if joined < len(self._names) else 0.02):
                if fd == pipe.fileno():
                    pipe.recv()
                    cpu = time.process_time()
                    pipe.send(("counts", self.sent, self.received, cpu))
                else:
                    self._read(self._by_fd[fd])
            if self.seen == len(self._names) and self._ordered.committed > told:
                told = self._ordered.committed
                pipe.send(("verdict", told, self.last))
            now = time.monotonic()
            if now - swept > 0.01:
                swept = now
                self._by_clock(now)

    def _by_clock(self, now: float) -> None:
        pause = self._lease / RENEWALS
        for node, lease in enumerate(self._leases):
            if now - self._renewed[node] > pause:
                self._renewed[node] = now
                self._send(node, {"op": "renew", "id": 0, "lease": lease})
            if self._told[node].serial and now - self._reported[node] > self._pace:
                self._report(node, self._known[node])  # as they do when nothing but steps has changed

    # ------------------------------------------------------------------ one node

    def _join(self, name: str) -> None:
        link = socket.create_connection((HOST, self._port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = _exactly(link, len(wire.MAGIC) + wire.NONCE)
        server, client = hello[len(wire.MAGIC) :], os.urandom(wire.NONCE)
        link.sendall(client + wire.proof_of(self._secret, wire.STORE, "client", server, client))
        _exactly(link, wire.PROOF)
        theirs, ours = wire.keys_of(self._secret, server, client)
        node = len(self._sockets)
        self._sockets.append(link)
        self._frames.append(Frames(ours, theirs))
        self._known.append(Ordered())
        self._told.append(Ordered())
        self._send(node, {"op": "grant", "id": 1, "seconds": self._lease})
        (answer,) = self._frames[node].take(link.recv(65536))
        self._leases.append(json.loads(answer)["ok"])
        self._renewed.append(time.monotonic() - self._lease / RENEWALS * (node % 100) / 100)
        self._reported.append(time.monotonic() - self._pace * (node % 100) / 100)
        self._put(node, _report_of(name, self._lives[node], Ordered(), in_session=False), expected=0)
        self._send(node, {"op": "watch", "id": 0, "directory": "job/", "since": 0})
        link.setblocking(False)
        self._by_fd[link.fileno()] = node
        self._poll.register(link.fileno(), select.EPOLLIN)

    def _read(self, node: int) -> None:
        try:
            data = self._sockets[node].recv(1 << 20)
        except BlockingIOError:
            return
        if not data:
            raise SystemExit(f"{self._names[node]} was put out")
        for content in self._frames[node].take(data):
            self.received += 1
            if content.startswith(b'{"directory"'):
                self._heed(node, content)
            elif not content.startswith(b'{"id":0,"ok":'):
                raise SystemExit(f"{self._names[node]} was answered {content!r}")

    def _heed(self, node: int, content: bytes) -> None:
        ordered, known = self._contents.get(content), self._known[node]
        if ordered is None:
            before = self._ordered
            ordered = self._contents[content] = _ordered(before, json.loads(content))
            if ordered.serial > before.serial:
                self._ordered = ordered
                self.seen = self.seen if ordered.committed == before.committed else 0
            if len(self._contents) > CONTENTS:
                del self._contents[next(iter(self._contents))]
        if ordered.committed > known.committed:
            self.seen += 1
            self.last = time.monotonic()
        self._known[node] = ordered
        if ordered != self._told[node]:
            self._report(node, ordered)

    def _report(self, node: int, ordered: Ordered) -> None:
        self._told[node] = ordered
        self._reported[node] = time.monotonic()
        self._put(node, _report_of(self._names[node], self._lives[node], ordered), None)

    def _put(self, node: int, text: str, expected: int | None) -> None:
        key, lease = f"node/{self._names[node]}", self._leases[node]
        self._send(
            node, {"op": "put", "id": 0, "key": key, "value": text, "expected": expected, "lease": lease}
        )

    def _send(self, node: int, message: dict[str, Any]) -> None:
        self.sent += 1
        self._sockets[node].sendall(self._frames[node].seal(wire.encoded(message)))


def _ordered(before: Ordered, push: dict[str, Any]) -> Ordered:
    """What the nodes do about what the store sends of ``job/``."""
    if "job/order" not in push["entries"]:
        return before
    order = json.loads(push["entries"]["job/order"][0])
    if order["serial"] <= before.serial:
        return before
    proposal, slot = order.get("proposal", {}), order.get("slot")
    serial, state = proposal.get("serial", 0), proposal.get("state", 0)
    committed = serial if state == 2 else before.committed
    new = committed > before.committed
    return Ordered(
        serial=order["serial"],
        answer=serial or before.answer,
        committed=committed,
        prepared=before.prepared if slot is None else slot["serial"],
        slot=slot["index"] if slot is not None and slot.get("offered") else before.slot,
        saved=proposal["step"] if new else before.saved,
        steps=proposal["step"] + 1 if new else before.steps,
    )


def _report_of(name: str, life: str, ordered: Ordered, *, in_session: bool = True) -> str:
    """As ``encoded`` writes the report of such a node (``_check``)."""
    course = answer = prepared = ""
    if in_session:
        steps = f',"first":{ordered.steps},"last":{ordered.steps}' if ordered.steps else ""
        saved = ""
        if ordered.saved:
            where = f'"attempt":0,"step":{ordered.saved},"slot":{ordered.slot}'
            saved = f',"saved":{{{where},"seconds":0.25,"bytes":1000000000}}'
        course = (
            f',"course":{{"attempt":0,"world_size":8,"in_session":true,"has_session":true{steps}{saved}}}'
        )
    if ordered.answer:
        answer = f',"answer":{{"serial":{ordered.answer},"confirmed":true}}'
    if ordered.prepared:
        prepared = f',"prepared":{ordered.prepared}'
    seen = f',"seen":{ordered.serial}' if ordered.serial else ""
    return (
        f'{{"name":"{name}","life":"{life}","host":"{name}.cluster","pid":4711,"address":"10.0.0.1","port":40000,'
        f'"shown":40001{seen}{course}{answer}{prepared}}}'
    )


def _check() -> None:
    ordered = Ordered(serial=7, answer=3, committed=3, prepared=5, slot=1, saved=1000, steps=1001)
    report = Report(
        name="n00001", life="0123456789abcdef", host="n00001.cluster", pid=4711, address="10.0.0.1", port=40000,
        shown=40001, seen=7, answer=Answer(serial=3, confirmed=True), prepared=5,
        course=Course(
            attempt=0, world_size=8, in_session=True, has_session=True, first=1001, last=1001,
            saved=Saved(attempt=0, step=1000, slot=1, seconds=0.25, bytes=1000000000),
        ),
    )  # fmt: skip
    text = _report_of("n00001", "0123456789abcdef", ordered)
    assert text == encoded(report), f"{text}\n{encoded(report)}"
    assert plain.from_plain(Report, json.loads(text)) == report


def _exactly(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = link.recv(count - len(data))
        if not more:
            raise SystemExit("the store has closed the connection")
        data += more
    return data


def run(first: int, count: int, total: int, port: int, secret: bytes, lease: float, pipe: Connection) -> None:
    """The process."""
    with contextlib.suppress(KeyboardInterrupt):
        Crowd(first, count, total, port, secret, lease).serve(pipe)
