"""What befalls the programs of these tests: rank 0 waits to be killed in attempt 0; all wait for a stop in attempt 1."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from supervisor.training import Session

OUT = Path(os.environ["OUT"])
KILL_AT, STOP_AT = int(os.environ["KILL_AT"]), int(os.environ["STOP_AT"])
RANK = int(os.environ.get("RANK", "0"))


def strike(session: Session) -> None:
    """To be called in every step, by every rank."""
    if session.attempt == 0 and session.step == KILL_AT and RANK == 0:
        _write("pid", str(os.getpid()))
        _wait(lambda: False, "nobody killed this rank")
    if session.attempt == 1 and session.step == STOP_AT:
        _write(f"ready-{RANK}", "")
        _wait(lambda: session.should_stop, "nobody asked this job to stop")


def _wait(come: Callable[[], bool], problem: str) -> None:
    limit = time.monotonic() + 200
    while not come():
        if time.monotonic() > limit:
            raise TimeoutError(problem)
        time.sleep(0.01)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def tell(**values: object) -> None:
    """What this rank has to say at its end."""
    _write(f"rank-{RANK}.json", json.dumps(values))


def _write(name: str, text: str) -> None:
    """At once, for whoever waits for it."""
    temporary = OUT / f"{name}.{RANK}.new"
    temporary.write_text(text)
    temporary.rename(OUT / name)
