"""A real etcd on loopback, one for a whole test process."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

DEADLINE = 60.0
#: where a container runs on another kind of machine than etcd's authors test
ENVIRONMENT = {"ETCD_UNSUPPORTED_ARCH": "arm64", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def is_installed() -> bool:
    return shutil.which("etcd") is not None


@contextlib.contextmanager
def running(
    host: str = "127.0.0.1", before: Sequence[str] = (), port: int | None = None, data: Path | None = None
) -> Iterator[int]:
    """An etcd for as long as the block lasts; its port. ``before``: words in front of the command (a namespace)."""
    folder = Path(tempfile.mkdtemp(prefix="everstep-etcd-"))
    client, peer = port or free_port(), free_port()
    argv = [
        *before, "etcd", "--name", "one", "--data-dir", str(data or folder / "data"),
        "--listen-client-urls", f"http://{host}:{client}", "--advertise-client-urls", f"http://{host}:{client}",
        "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
        "--initial-cluster", f"one=http://127.0.0.1:{peer}", "--log-level", "error",
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        if not before:
            _until_healthy(host, client, process, folder)
        yield client
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _until_healthy(host: str, port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    limit = time.monotonic() + DEADLINE
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5) as answer:
                if b"true" in answer.read():
                    return
        lives = process.poll() is None and time.monotonic() < limit
        assert lives, (folder / "log").read_text()
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
