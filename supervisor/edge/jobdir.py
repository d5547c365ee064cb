"""The job's directory: who holds it, and what lies in it. What it has in memory is in ``runtimes``.

One supervisor owns a job at a time, by an ``flock`` on ``D/lock`` that dies with it. Each owner takes the next *epoch*,
written to ``D/job.json`` before anything else; a commit re-reads it, so an older owner that the lock could not
stop (a file system without locks between hosts) can no longer commit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from supervisor.edge import clock, runtimes
from supervisor.errors import JobError, StorageError

FORMAT = 1
LOCK_PATIENCE = 0.5  # seconds; `everstep status` looks at the lock for microseconds
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # e.g. Lustre mounted without flock


@dataclass(frozen=True)
class JobFile:
    """``D/job.json``."""

    run_id: str
    runtime: str
    epoch: int
    identity: str  # what may not change between runs: the script or module
    command: list[str]
    created: float
    format: int = FORMAT
    host: str = ""  # whose supervisor opened this epoch


class JobDirectory:
    """The paths of one job. Nothing is created before ``claim``."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.journal = self.path / "journal"
        self.attempts = self.path / "attempts"
        self.file = self.path / "job.json"
        #: why the directory could not be locked: then the epoch alone fences rivals
        self.unlocked: str | None = None

    def attempt(self, number: int) -> Path:
        """Where the logs and the evidence of one attempt lie."""
        return self.attempts / f"{number:06d}"

    def logs(self, number: int) -> Path:
        """One log per rank, named ``rank-<global rank>.log``, and torchrun's own."""
        return self.attempt(number) / "logs"

    def read(self) -> JobFile | None:
        """The job file, or None where no job lies. Raises JobError for a file that is not ours."""
        try:
            raw = json.loads(self.file.read_text())
            if raw["format"] > FORMAT:
                raise JobError(
                    f"{self.file}: written by a newer everstep (format {raw['format']}, this one knows {FORMAT})"
                )
            known = {field.name for field in fields(JobFile)}  # a newer minor version may say more
            return JobFile(**{name: value for name, value in raw.items() if name in known})
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JobError(f"{self.file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"{self.file}: not a job file ({error})") from None

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the job's lock; raises JobError naming the holder, or why the directory cannot be used."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / "lock", "a+")  # noqa: SIM115 (held to the end)
        except OSError as error:
            raise JobError(f"job directory {self.path}: {error.strerror}") from None
        with handle:
            deadline = clock.monotonic() + LOCK_PATIENCE
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno in _NO_LOCKS:
                        self.unlocked = error.strerror
                        break
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise JobError(f"{self.path}/lock: {error.strerror}") from None
                    if clock.monotonic() > deadline:
                        handle.seek(0)
                        holder = handle.read().strip() or "another supervisor"
                        raise JobError(f"{self.path} is in use: {holder}") from None
                    time.sleep(0.02)
            handle.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
            handle.write(f"everstep run, pid {os.getpid()} on {socket.gethostname()}, since {started}\n")
            handle.flush()
            yield

    def check(self, identity: str) -> None:
        """Raise JobError when the directory holds the job of another program.

        A script of the same name in another place is the same one if it has gone from where it was.
        """
        old = self.read()
        if old is None or old.identity == identity:
            return
        moved = Path(old.identity).name == Path(identity).name and not os.path.exists(old.identity)
        if not moved:
            raise JobError(
                f"{self.path} holds the job of {old.identity}, not of {identity}: give another --dir"
            )

    def open_epoch(self, identity: str, command: list[str], node: str | None = None) -> JobFile:
        """Take the job (or make it) for a new epoch. The caller holds the lock. ``node``: its name, where there are several."""
        self.check(identity)
        old = self.read()
        if old is None:
            run_id = secrets.token_hex(8)
            runtime = runtimes.make(run_id, node)
            new = JobFile(run_id, str(runtime), 1, identity, command, clock.now(), host=socket.gethostname())
        else:
            run_id, runtime = old.run_id, Path(old.runtime)
            if runtimes.is_of_another(runtime, self.file):
                run_id = secrets.token_hex(8)
                runtime = runtimes.make(run_id, node)
            elif not runtimes.is_private(runtime) or runtime.name.partition("@")[2] != (node or ""):
                runtime = runtimes.make(run_id, node)
            new = replace(
                old,
                run_id=run_id,
                epoch=old.epoch + 1,
                runtime=str(runtime),
                identity=identity,
                command=command,
                host=socket.gethostname(),
            )
        try:
            temporary = self.file.with_suffix(".tmp")
            with open(temporary, "w") as handle:
                json.dump(asdict(new), handle, indent=1)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.rename(self.file)
        except OSError as error:
            raise JobError(f"{self.file}: {error.strerror}") from None
        return new

    def fence(self, epoch: int) -> None:
        """Raise StorageError when a newer supervisor has taken the job."""
        current = self.read()
        if current is not None and current.epoch != epoch:
            raise StorageError(
                f"a newer supervisor (epoch {current.epoch}) owns {self.path}: epoch {epoch} must not commit"
            )
