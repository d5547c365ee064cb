"""``everstep serve``: the report of one or several jobs as a page that follows them, for this machine alone.

It reads what ``everstep status`` reads, writes nothing, and answers nobody who does not bring the token that it prints.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from supervisor.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from launch.served import Server

PORT: Final = 8765
ADDRESS: Final = "127.0.0.1"
TOKEN: Final = "EVERSTEP_SERVE_TOKEN"
SHORTEST_TOKEN: Final = 16
TEXT: Final = """\
Serves the report as a page that follows the job while it runs. Only who has the token in the printed address sees anything,
and nothing can be changed through it. From elsewhere: ssh -L 8765:127.0.0.1:8765 HOST, then open the address there.
"""


def add_parser(commands: Any) -> Any:
    """The words of the command."""
    parser = commands.add_parser(
        "serve", help="the report as a live page on localhost", description=TEXT,
        epilog=f"{TOKEN} in the environment fixes the token ({SHORTEST_TOKEN} characters or more); else it is a new one each time",
    )  # fmt: skip
    parser.add_argument(
        "--dir", metavar="D", action="append", help="job directory; may be given several times (default: all in everstep-runs)"
    )  # fmt: skip
    parser.add_argument(
        "--port", metavar="N", help=f"0: any that is free (default: {PORT}, or any if that is taken)"
    )
    parser.add_argument(
        "--address", metavar="ADDRESS", default=ADDRESS, help=f"to listen on (default: {ADDRESS})"
    )
    return parser


def answer(given: Mapping[str, Any], find_jobs: Callable[[Sequence[str] | None], list[Path]]) -> int:
    """Serve until Ctrl-C. Raises UsageError, ConfigError or JobError before it begins."""
    from launch.served import Followed

    port = None if given["port"] is None else _port(given["port"])
    token = _token(os.environ.get(TOKEN))
    jobs = [Followed(path) for path in find_jobs(given["dir"])]
    for job in jobs:
        job.status()  # one that cannot be shown is said now
    server = _server(given["address"], port, jobs, token)
    host = f"[{server.address}]" if ":" in server.address else server.address
    print(f"http://{host}:{server.port}/?token={token}", flush=True)
    print(f"everstep: serves {len(jobs)} of your jobs, read-only; Ctrl-C ends it", file=sys.stderr)
    with server:
        server.serve_forever()
    return 0


def _server(address: str, port: int | None, jobs: list[Any], token: str) -> Server:
    from launch.served import Server

    try:
        return Server((address, PORT if port is None else port), jobs, token)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return _server(address, 0, jobs, token)
        raise UsageError(
            f"cannot listen on {address} port {PORT if port is None else port}: {error.strerror or error}"
        ) from None
    except OverflowError:
        raise UsageError(f"--port {port}: a number from 0 to 65535") from None


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise UsageError(f"--port {text}: a number from 0 to 65535")
    return int(text)


def _token(given: str | None) -> str:
    if given is None:
        return secrets.token_urlsafe(24)
    if (
        len(given) < SHORTEST_TOKEN
        or not all(sign.isalnum() or sign in "-_." for sign in given)
        or not given.isascii()
    ):
        raise ConfigError(f"{TOKEN}: {SHORTEST_TOKEN} or more letters, digits, or any of - _ .")
    return given
