"""Runtime directories that jobs have left in this node's memory, and slots on its disk, are removed.

What is locked is in use. What is not may belong to a job that will want it again, so it goes only if that job, looked for where the
directory says, has gone or has moved on; and only if who looks sees the same files there as the job did: containers that
share memory may have other files under the same name.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from supervisor.edge import clock, runtimes
from supervisor.edge.jobdir import JobDirectory, JobFile
from supervisor.errors import JobError

_SURELY_LAID_OUT: Final = 3600.0  # seconds after it was made, a runtime directory has something in it


def sweep(keep: Path) -> None:
    """Remove runtime directories of jobs whose own directory is gone, or that have moved on to another one or another host."""
    for runtime in keep.parent.iterdir():
        if runtime == keep:
            continue
        follows = (runtime / runtimes.MEMBER).is_file()
        if not (follows or (runtime / runtimes.OWNER).is_file()):
            _remove_if_forgotten(runtime)
            continue
        with contextlib.suppress(OSError, JobError):  # cannot tell: not ours to remove
            job = JobDirectory(Path((runtime / (runtimes.OWNER, runtimes.MEMBER)[follows]).read_text()))
            if _is_seen_alike(runtime, job.path) and _is_left(runtime, job, follows=follows):
                with _unused(runtime) as is_unused:
                    if is_unused:
                        runtimes.remove(runtime)
    for place in runtimes.slots_on_disk_of_other_boots():
        shutil.rmtree(place, ignore_errors=True)


def _is_left(runtime: Path, job: JobDirectory, *, follows: bool) -> bool:
    file = job.read()
    if file is None:  # deleted, or merely not mounted at present?
        return not job.path.exists() and job.path.parent.is_dir() and any(job.path.parent.iterdir())
    if follows:  # it may be wanted, as long as the job runs on several nodes
        return "@" not in file.runtime and _is_older(file, runtime)
    return file.runtime != str(runtime) or _runs_elsewhere(file, runtime)


@contextlib.contextmanager
def _unused(runtime: Path) -> Iterator[bool]:
    """Whether nobody uses it; nor does anybody begin to, meanwhile."""
    with open(runtime / runtimes.LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _is_seen_alike(runtime: Path, job: Path) -> bool:
    try:
        recorded = (runtime / runtimes.SIGHT).read_text().splitlines()
    except FileNotFoundError:
        return True  # it was made by an older version
    return not set(recorded).isdisjoint(runtimes.sight(job))


def _remove_if_forgotten(runtime: Path) -> None:
    """An empty directory, of a supervisor that was killed before it laid it out."""
    with contextlib.suppress(OSError):  # it is not empty, or has gone
        if clock.now() - runtime.stat().st_mtime > _SURELY_LAID_OUT:
            runtime.rmdir()


def _runs_elsewhere(file: JobFile, runtime: Path) -> bool:
    """Whether a later supervisor of the job, on another host, has gone on without what lies here."""
    return file.host not in ("", socket.gethostname()) and _is_older(file, runtime)


def _is_older(file: JobFile, runtime: Path) -> bool:
    """Whether a later supervisor has had the job since."""
    try:
        return file.epoch > int((runtime / "epoch").read_text())
    except (OSError, ValueError):
        return False
