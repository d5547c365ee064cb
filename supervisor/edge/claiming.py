"""A directory of checkpoints that several jobs may have been given by mistake: one at a time uses it.

Each would remove what the other has not finished yet, and resume from what the other has saved. The lock dies with the process; where a
file system has none, nothing is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path
from typing import IO, Final

from supervisor.errors import ConfigError

NAME: Final = ".everstep-lock"


def claim(place: Path, run_id: str, job: Path) -> IO[str] | None:
    """The lock of ``place``, to be held to the end; None where it cannot be had, or the same run holds it on another node.

    Raises ConfigError when another run uses it.
    """
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        lock = open(place / NAME, "a+")  # noqa: SIM115 (held to the end)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with lock:
                lock.seek(0)
                holder, _, where = lock.read().strip().partition(" ")
            if holder != run_id:
                raise ConfigError(
                    f"--checkpoints {place} is used by another job, {where or 'which has just begun'}: give each one of its own"
                ) from None
            return None
        except OSError:
            lock.close()
            return None
        lock.truncate(0)
        lock.write(f"{run_id} {job}\n")
        lock.flush()
        return lock
    return None
