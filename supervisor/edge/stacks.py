"""Asking living processes where they are: Python stacks from themselves, native ones from py-spy where it is installed.

A worker writes its stacks when it gets the signal that it named on its control page (``launch/vital.py``). Nobody says when the
writing is over; a dump that has not grown for a moment is taken for whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.edge import clock

_PERIOD: Final = 0.02
_WHOLE: Final = 0.1  # seconds without growth


@dataclass(frozen=True)
class Asked:
    """A process to ask: ``number`` is the signal that makes it write to ``file``; 0: it cannot be asked."""

    rank: int
    pid: int
    number: int
    file: Path


async def collect(asked: Sequence[Asked], patience: float) -> dict[int, str]:
    """The stacks of those that answer within ``patience`` seconds, by rank."""
    able = [one for one in asked if one.number and _handles(one.pid, one.number)]
    before = {one.rank: _size(one.file) for one in able}
    for one in able:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(one.pid, one.number)
    sizes, changed = dict(before), dict.fromkeys(before, clock.monotonic())
    deadline = clock.monotonic() + patience
    while (now := clock.monotonic()) < deadline:
        for one in able:
            if (size := _size(one.file)) != sizes[one.rank]:
                sizes[one.rank], changed[one.rank] = size, now
        if all(sizes[rank] > before[rank] and now - changed[rank] > _WHOLE for rank in before):
            break
        await asyncio.sleep(_PERIOD)
    texts = {one.rank: _read(one.file, before[one.rank]) for one in able}
    return {rank: text for rank, text in texts.items() if text}


async def collect_native(pids: dict[int, int], patience: float) -> dict[int, str]:
    """Stacks with their C++ frames, by rank, if py-spy is installed and allowed to look."""
    tool = shutil.which(
        "py-spy", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    )
    if tool is None:
        return {}
    texts = await asyncio.gather(*(asyncio.to_thread(_spy, tool, pid, patience) for pid in pids.values()))
    return {rank: text for rank, text in zip(pids, texts, strict=True) if text}


def _spy(tool: str, pid: int, patience: float) -> str:
    command = [tool, "dump", "--native", "--pid", str(pid)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=patience, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _handles(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal: it would die of it else."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _read(file: Path, start: int) -> str:
    try:
        with open(file, "rb") as handle:
            handle.seek(start)
            return handle.read().decode(errors="replace")
    except OSError:
        return ""
