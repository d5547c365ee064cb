"""``etcd://``: a real etcd (v3), for jobs that must outlive any of their nodes. Needs the extra ``[etcd]``.

Spoken to over etcd's JSON gateway, by etcd3gw. Its calls block, so each is made in a thread. Its watches are not used: they
know neither deadlines nor what etcd says when it has forgotten too much.

Who may read and write etcd is etcd's own affair (users, TLS). Beside that every value bears an HMAC by the job's secret over its key
and its content, and one that does not is taken for absent: to write to etcd is not enough to give orders to a job.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import ConnectionFailedError, ConnectionTimeoutError, Etcd3Exception

from supervisor.edge.store.address import StoreAddress, etcd_files
from supervisor.edge.store.protocol import ANSWER, Entry, View
from supervisor.edge.threads import in_thread
from supervisor.errors import LeaseLostError, StoreError

LEAST: Final = 1.0  # seconds that a watch waits, since etcd confirms it first
_PROOF: Final = 64  # characters
_NO_LEASE: Final = "requested lease not found"
_NO_TOKEN: Final = "invalid auth token"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where etcd is, and as whom. ``certificates``: the CA's file, the client's key and certificate."""

    hosts: Sequence[tuple[str, int]]
    prefix: str
    tls: bool = False
    user: str | None = None
    password: str | None = None
    ca: str | None = None
    key: str | None = None
    certificate: str | None = None


def access(address: StoreAddress, job: str) -> Access:
    """To the etcd of a parsed URL and of the environment; without a prefix the job's name is one."""
    files = etcd_files()
    return Access(
        hosts=address.hosts, prefix=address.prefix or f"/everstep/{job}/", tls=address.scheme == "etcds",
        user=address.user, password=address.password, ca=files["ca"], key=files["key"], certificate=files["certificate"],
    )  # fmt: skip


class EtcdStore:
    """A Store under ``access.prefix``. One host after the other is tried when one does not answer."""

    def __init__(self, access: Access, secret: bytes, *, answer: float = ANSWER) -> None:
        self._access, self._secret, self._answer = access, secret, answer
        self._turn = 0
        self._idle: list[Etcd3Client] = []  # connected, to the host whose turn it is
        self._token: str | None = None

    async def read(self, directory: str) -> View:
        """As the protocol says."""
        return await self._do(lambda client: self._read(client, directory))

    async def changes(self, directory: str, since: int, patience: float) -> View:
        """As the protocol says."""
        return await self._do(lambda client: self._watch(client, directory, since, patience))

    async def put(
        self, key: str, value: str | None, *, expected: int | None = None, lease: int | None = None
    ) -> int | None:
        """As the protocol says."""
        return await self._do(lambda client: self._put(client, key, value, expected, lease))

    async def grant(self, seconds: float) -> int:
        """As the protocol says; etcd counts in whole seconds."""
        answer = await self._do(
            lambda client: self._post(client, "/lease/grant", {"TTL": math.ceil(seconds)})
        )
        return int(answer["ID"])

    async def renew(self, lease: int) -> bool:
        """As the protocol says."""
        answer = await self._do(lambda client: self._post(client, "/lease/keepalive", {"ID": lease}))
        return int(answer.get("result", {}).get("TTL", 0)) > 0

    async def close(self) -> None:
        """Threads that still wait end by themselves."""

    # ------------------------------------------------------------------ operations; in a thread

    def _read(self, client: Etcd3Client, directory: str) -> View:
        answer = self._post(client, "/kv/range", self._range(directory))
        entries = {}
        for pair in answer.get("kvs", ()):
            key, entry = self._entry(pair)
            if entry is not None:
                entries[key] = entry
        return View(revision=int(answer["header"]["revision"]), whole=True, entries=entries)

    def _put(
        self, client: Etcd3Client, key: str, value: str | None, expected: int | None, lease: int | None
    ) -> int | None:
        name = _encoded(self._access.prefix + key)
        if value is None:
            change: dict[str, Any] = {"request_delete_range": {"key": name}}
        else:
            sealed = self._proof(key, value) + value
            change = {"request_put": {"key": name, "value": _encoded(sealed), "lease": lease or 0}}
        compare = [] if expected is None else [{"key": name, "target": "MOD", "mod_revision": expected}]
        answer = self._post(client, "/kv/txn", {"compare": compare, "success": [change]})
        return int(answer["header"]["revision"]) if answer.get("succeeded") else None

    def _watch(self, client: Etcd3Client, directory: str, since: int, patience: float) -> View:
        request = {**self._range(directory), "start_revision": since + 1}
        heard = False
        try:
            with client.session.post(
                client.get_url("/watch"), json={"create_request": request}, stream=True,
                timeout=(self._answer, max(patience, min(self._answer, LEAST))),
            ) as response:  # fmt: skip
                for line in response.iter_lines():
                    heard = True
                    result = json.loads(line).get("result", {}) if line.strip() else {}
                    # it has forgotten too much; or it is not the etcd that it was
                    if result.get("canceled") or since > int(result.get("header", {}).get("revision", since)):
                        return self._read(client, directory)
                    if result.get("events"):
                        return self._changed(result["events"])
        except requests.exceptions.ConnectTimeout:
            raise
        except (requests.exceptions.Timeout, requests.exceptions.ConnectionError) as error:
            if not heard or "timed out" not in str(error).lower():
                raise
        return View(revision=since, whole=False)

    def _changed(self, events: Sequence[dict[str, Any]]) -> View:
        entries: dict[str, Entry] = {}
        gone: set[str] = set()
        revision = 0
        for event in events:
            key, entry = self._entry(event["kv"])
            revision = max(revision, int(event["kv"]["mod_revision"]))
            if event.get("type") == "DELETE" or entry is None:
                entries.pop(key, None)
                gone.add(key)
            else:
                entries[key] = entry
                gone.discard(key)
        return View(revision=revision, whole=False, entries=entries, gone=frozenset(gone))

    def _range(self, directory: str) -> dict[str, Any]:
        name = self._access.prefix + directory  # ends with a slash, so that what follows it is a "0"
        return {"key": _encoded(name), "range_end": _encoded(name[:-1] + chr(ord("/") + 1))}

    def _entry(self, pair: dict[str, Any]) -> tuple[str, Entry | None]:
        key = base64.b64decode(pair["key"]).decode().removeprefix(self._access.prefix)
        sealed = base64.b64decode(pair.get("value", "")).decode(errors="replace")
        value = sealed[_PROOF:]
        if not hmac.compare_digest(sealed[:_PROOF].encode(), self._proof(key, value).encode()):
            return key, None
        return key, Entry(value, int(pair["mod_revision"]))

    def _proof(self, key: str, value: str) -> str:
        return hmac.new(self._secret, f"{len(key)}:{key}{value}".encode(), hashlib.sha256).hexdigest()

    # ------------------------------------------------------------------ the client

    async def _do(self, work: Callable[[Etcd3Client], T]) -> T:
        def attempt() -> T:
            first: StoreError | None = None
            for _ in self._access.hosts:
                try:
                    client = self._idle.pop() if self._idle else self._new_client()
                    result = work(client)
                    self._idle.append(client)
                    return result
                except (
                    ConnectionFailedError,
                    ConnectionTimeoutError,
                    requests.exceptions.RequestException,
                ) as error:
                    first = first or StoreError(f"etcd at {self._host}: {_one_line(error)}")
                    self._turn += 1
                    self._idle.clear()
                except Etcd3Exception as error:
                    if _NO_TOKEN in str(error.detail_text):  # they expire
                        self._token = None
                        self._idle.clear()
                    if _NO_LEASE in str(error.detail_text):
                        raise LeaseLostError("there is no such lease (any more)") from None
                    raise StoreError(f"etcd at {self._host}: {_one_line(error.detail_text)}") from None
            assert first is not None
            raise first from None

        return await in_thread(attempt)

    @property
    def _host(self) -> str:
        host, port = self._access.hosts[self._turn % len(self._access.hosts)]
        return f"{host}:{port}"

    def _new_client(self) -> Etcd3Client:
        access = self._access
        host, port = access.hosts[self._turn % len(access.hosts)]
        client = Etcd3Client(
            host, port, protocol="https" if access.tls else "http", ca_cert=access.ca, cert_key=access.key,
            cert_cert=access.certificate, timeout=self._answer, api_path="/v3/",
        )  # fmt: skip
        client.session.trust_env = False  # no proxy between a job and its store
        if access.user is not None:
            if self._token is None:
                named = {"name": access.user, "password": access.password or ""}
                self._token = str(client.post(client.get_url("/auth/authenticate"), json=named)["token"])
            client.session.headers["Authorization"] = self._token
        return client

    def _post(self, client: Etcd3Client, path: str, request: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = client.post(client.get_url(path), json=request)
        return answer


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _one_line(error: object) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
