"""Ranks as fresh processes, cheaply: a fork server that has torch imported already, and a deadline on everything."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

PRELOAD = [
    "torch",
    "torch.nn.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",
]
DEADLINE = 90.0  # seconds

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOAD, "torchdata.stateful_dataloader", "numpy"])


class RankError(AssertionError):
    """A rank ended with an exception: its text."""


def launch(
    function: Callable[..., Any],
    world: int = 1,
    /,
    *args: Any,
    environ: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Run ``function(*args, **kwargs)`` on ``world`` ranks; their results, or the negative signal or exit code of each.

    Raises RankError when one raised anything but SystemExit.
    """
    with start(function, world, *args, environ=environ, **kwargs) as ranks:
        return collect(ranks)


@contextlib.contextmanager
def start(
    function: Callable[..., Any],
    world: int = 1,
    /,
    *args: Any,
    environ: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """As ``launch``, while they run; whatever still runs at the end of the block is killed."""
    port = free_port()
    ranks: list[tuple[BaseProcess, Connection]] = []
    with _without_main():
        for rank in range(world):
            ours, theirs = _context.Pipe()
            variables = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(environ or {}),
            }  # fmt: skip
            process = _context.Process(target=_rank, args=(theirs, variables, function, args, kwargs))
            process.start()
            theirs.close()
            ranks.append((process, ours))
    try:
        yield ranks
    finally:
        for process, connection in ranks:
            process.kill()
            process.join()
            connection.close()


def collect(ranks: list[tuple[BaseProcess, Connection]], deadline: float = DEADLINE) -> list[Any]:
    """What the ranks return."""
    end = time.monotonic() + deadline
    results: dict[int, Any] = {}
    pending = {connection: (index, process) for index, (process, connection) in enumerate(ranks)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{len(pending)} of {len(ranks)} ranks still run after {deadline:g} s")
        for connection in ready:
            index, process = pending.pop(connection)
            try:
                kind, value = connection.recv()
            except EOFError:
                process.join()
                kind, value = "gone", process.exitcode
            if kind == "raised":
                raise RankError(f"rank {index}:\n{value}")
            results[index] = value
    return [results[index] for index in range(len(ranks))]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(
    connection: Connection, variables: Mapping[str, str], function: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    os.environ.update(variables)
    if "EVERSTEP_RUNTIME" in variables:
        os.environ["EVERSTEP_WORKER_PID"] = str(os.getpid())
    multiprocessing.set_start_method("fork", force=True)  # as a script has it, for its loader's workers
    import torch

    torch.set_num_threads(1)
    try:
        outcome: tuple[str, Any] = ("returned", function(*args, **kwargs))
    except SystemExit as error:
        outcome = ("returned", ("exit", error.code))
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    connection.send(outcome)
    connection.close()
    sys.stdout.flush()
    os._exit(0)  # an orderly end would wait for process groups whose other ranks were killed


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes do not import pytest's ``__main__`` again."""
    main = sys.modules["__main__"]
    saved = {name: main.__dict__.pop(name) for name in ("__spec__", "__file__") if name in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(saved)
