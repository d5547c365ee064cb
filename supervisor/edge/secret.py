"""The secret of a job on several nodes: from ``EVERSTEP_KEY``, else made by the first node, in the job directory that they share."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from blake3 import blake3

from supervisor.errors import JobError

FILE: Final = "secret"
VARIABLE: Final = "EVERSTEP_KEY"
_CONTEXT: Final = "everstep 2026-11 nodes"


def of_job(job: Path, environ: Mapping[str, str] = os.environ) -> bytes:
    """32 bytes, the same on all nodes. Raises JobError when the directory cannot be used, or others could read it there."""
    given = environ.get(VARIABLE)
    return blake3((given or _in_file(job)).encode(), derive_key_context=_CONTEXT).digest()


def _in_file(job: Path) -> str:
    """Whoever links it first has made it: an operation that is atomic on NFS, too."""
    path = job / FILE
    try:
        job.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            own = job / f".{FILE}-{os.getpid()}-{secrets.token_hex(4)}"
            fd = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
            own.unlink()
        status = path.lstat()
        if status.st_mode & 0o077 or status.st_uid not in (os.getuid(), 0):
            raise JobError(f"{path} is open to others: remove it, or chmod 600")
        return path.read_text()
    except OSError as error:
        raise JobError(f"{error.filename or path}: {error.strerror}") from None
