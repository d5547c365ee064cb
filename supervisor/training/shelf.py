"""The directory of library mode: who holds it, what it offers to resume from, how a checkpoint comes into it.

Used by rank 0 alone. Two runs never share a directory (an ``flock`` on ``lock``, which dies with its process), so a
leftover found on entering is nobody's work in progress. Nothing that may be good is ever removed to make room: a
checkpoint in the way is renamed aside, whole, and only what is damaged for certain goes once its successor is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO, Final

import tenacity

from supervisor.checkpoint import catalog, directory
from supervisor.checkpoint.commit import no_fence, seal
from supervisor.checkpoint.displaced import Displaced
from supervisor.checkpoint.manifest import Key, Origin
from supervisor.decide.retention import RetentionPolicy, to_remove
from supervisor.edge.files import LOCAL
from supervisor.errors import CheckpointError, JobError, StorageError
from supervisor.training.world import say

_PATIENCE: Final = 1.0  # seconds; `everstep status` looks at the lock for microseconds
_HELD: Final = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # e.g. Lustre mounted without flock
_SHOWN: Final = 3  # refused checkpoints in an error


class Shelf:
    """``root/checkpoints``, held from construction to ``close``. Raises JobError when another run holds it."""

    def __init__(self, root: Path, policy: RetentionPolicy) -> None:
        self._checkpoints = root / "checkpoints"
        self._policy = policy
        self._key = Key.from_environment()
        self._bad: set[Path] = set()  # looked whole, were not
        self._making: contextlib.ExitStack | None = None
        self._lock = _hold(root)
        try:
            for path in catalog.sweep(self._checkpoints):
                say(f"{path} was never finished: removed")
        except StorageError as error:
            say(f"{error}; going on")

    def newest(self, skip: Collection[Path]) -> catalog.CheckpointRecord | None:
        """The newest checkpoint that verifies; None where there is none at all.

        Raises CheckpointError when there are checkpoints but none can be used: to start from the beginning there would
        throw the training away.
        """
        record, refused = catalog.newest_good(self._checkpoints, self._key, skip)
        for bad in refused:
            say(f"{bad.path} is skipped: {bad.problem}")
            self._bad.add(catalog.local(bad))
        if record is None and (refused or skip):
            reasons = [f"{bad.path.name}: {bad.problem}" for bad in refused] + [path.name for path in skip]
            more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
            raise CheckpointError(
                f"none of the checkpoints in {self._checkpoints} can be used ({'; '.join(reasons[:_SHOWN])}{more}): "
                "repair what is wrong, or give another dir= to start from the beginning"
            )
        return record

    def is_good(self, path: Path) -> bool:
        """Whether every byte of a checkpoint is as it was committed."""
        good = not catalog.verify(catalog.inspect(path, self._key), self._key)
        if not good:
            self._bad.add(path)
        return good

    def begin(self, target: Path) -> None:
        """Make room for a checkpoint, and mark it unfinished. Raises OSError."""
        self.abandon(target)
        with contextlib.ExitStack() as stack:
            stack.enter_context(Displaced(target, self._key, no_fence, LOCAL))
            directory.begin(target)
            self._making = stack.pop_all()

    def commit(self, target: Path, origin: Origin, names: Collection[str]) -> None:
        """Make a checkpoint of the files ``names``. Raises StorageError and CheckpointError, with nothing left of it."""
        try:
            if missing := sorted(set(names) - directory.payload(target).keys()):
                raise CheckpointError(
                    f"{target} lacks {', '.join(missing[:_SHOWN])}, which other ranks have written: "
                    "dir= must be on storage that all nodes share"
                )
            seal(target, origin, key=self._key, names=names or None)
        except (CheckpointError, StorageError, OSError) as error:
            self.abandon(target)
            if isinstance(error, OSError):
                raise directory.translated(error, "sealing", target) from error
            raise
        making, self._making = self._making, None
        self._bad.discard(target)
        if making is not None:
            try:
                making.close()
            except OSError as error:
                say(f"{error}; going on")

    def abandon(self, target: Path) -> None:
        """What was written of a checkpoint goes, and what was in its place comes back. Never raises for storage."""
        making, self._making = self._making, None
        if making is not None:
            error = StorageError(f"{target} was not written")
            making.__exit__(StorageError, error, None)

    def prune(self, newest: int) -> None:
        """Remove the checkpoints that no rule keeps. Raises StorageError."""
        records = [
            r for r in catalog.list_checkpoints(self._checkpoints, self._key) if r.path not in self._bad
        ]
        doomed = to_remove(records, self._policy, protected={newest})
        for record in records:
            if record.step in doomed and record.problem is None:
                catalog.remove(record)

    def close(self) -> None:
        """Let another run have it."""
        self._lock.close()


def _hold(root: Path) -> IO[str]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = open(root / "lock", "a+")  # noqa: SIM115 (held to the end)
    except OSError as error:
        raise JobError(f"dir={root}: {error.strerror}") from None
    # a loader's workers, forked and left behind by a killed run, must not hold it
    os.register_at_fork(after_in_child=handle.close)
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, OSError) and e.errno in _HELD),
        wait=tenacity.wait_fixed(0.05),
        stop=tenacity.stop_after_delay(_PATIENCE),
        reraise=True,
    )
    try:
        retry(fcntl.flock, handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            say(f"{root} cannot be locked ({error.strerror}): see to it that no other run uses it")
            return handle
        handle.seek(0)
        holder = handle.read().strip() or "another run"
        handle.close()
        if error.errno not in _HELD:
            raise JobError(f"{root}/lock: {error.strerror}") from None
        raise JobError(f"{root} is in use: {holder}; give each run a dir= of its own") from None
    handle.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
    handle.write(f"a Session, pid {os.getpid()} on {socket.gethostname()}, since {since}\n")
    handle.flush()
    return handle
