"""Azurite (npm: azurite), Microsoft's own emulator of Azure Blob Storage: it checks signatures and honours If-None-Match."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import pytest

VERSION = "3.37.0"
#: of the emulator: learn.microsoft.com/azure/storage/common/storage-use-azurite#well-known-storage-account-and-key
ACCOUNT = "devstoreaccount1"
SECRET = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
DEADLINE = 60.0
_HOME = Path(sys.prefix) / f"azurite-{VERSION}"  # it goes with the virtual environment


@dataclass(frozen=True)
class Server:
    """A running server with one container, ``ckpt``."""

    port: int

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a client finds in its environment."""
        return {
            "AZURE_STORAGE_USE_EMULATOR": "true",
            "AZURITE_BLOB_STORAGE_URL": endpoint or f"http://127.0.0.1:{self.port}",
            "AZURE_ALLOW_HTTP": "true",
        }


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server with an empty container, for as long as the block lasts."""
    program = _installed()
    folder = Path(tempfile.mkdtemp(prefix="everstep-azurite-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [program, "--blobPort", str(port), "--location", folder / "data", "--skipApiVersionCheck"]
    with (
        open(folder / "output", "wb") as sink,
        subprocess.Popen(argv, cwd=folder, stdout=sink, stderr=sink) as server,
    ):
        try:
            _await(port, server, folder / "output")
            yield Server(port)
        finally:
            server.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _installed() -> Path:
    """The program; fetched the first time, which takes half a minute."""
    program = _HOME / "node_modules" / ".bin" / "azurite-blob"
    if not program.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("Azurite needs npm")
        fresh = Path(tempfile.mkdtemp(prefix="azurite-", dir=sys.prefix))
        words = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", fresh]
        subprocess.run([*words, f"azurite@{VERSION}"], check=True, capture_output=True, timeout=300)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(fresh, _HOME)
        shutil.rmtree(fresh, ignore_errors=True)
    return program


def _await(port: int, server: subprocess.Popen[bytes], output: Path) -> None:
    limit = time.monotonic() + DEADLINE
    while True:
        try:
            _make_container(port)
            return
        except (OSError, urllib.error.URLError):
            if server.poll() is not None or time.monotonic() > limit:
                raise AssertionError(f"no Azurite:\n{output.read_text(errors='replace')}") from None
            time.sleep(0.1)


def _make_container(port: int) -> None:
    """Signed as learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key says."""
    date = formatdate(usegmt=True)
    signed = "\n".join(
        ["PUT", *11 * [""], f"x-ms-date:{date}", "x-ms-version:2023-11-03", f"/{ACCOUNT}/{ACCOUNT}/ckpt", "restype:container"]
    )  # fmt: skip
    mac = hmac.new(base64.b64decode(SECRET), signed.encode(), hashlib.sha256).digest()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{ACCOUNT}/ckpt?restype=container",
        method="PUT",
        headers={
            "x-ms-date": date,
            "x-ms-version": "2023-11-03",
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(mac).decode()}",
            "Content-Length": "0",
        },
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 201
