"""Which ranks of a job run on this host, and where their control pages are: of a job on several nodes, those of the nodes that are here."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from supervisor.edge.control import ControlPage, Word
from supervisor.edge.jobdir import JobFile
from supervisor.edge.link import control_folder, page_path
from supervisor.edge.runtimes import MEMBER, OWNER


@dataclass(frozen=True)
class Seat:
    """A rank that runs here: its node's runtime directory, and its number there."""

    runtime: Path
    local_rank: int


def is_of_several(file: JobFile) -> bool:
    """Whether the job runs on several nodes."""
    return "@" in Path(file.runtime).name


def seats(file: JobFile, job: Path, attempt: int) -> dict[int, Seat]:
    """By rank, of a job on several nodes. Another user's are not seen."""
    found: dict[int, Seat] = {}
    for runtime in _runtimes(file.run_id, job):
        for page in sorted(control_folder(runtime, attempt).glob("rank-*")):
            local = int(page.name.rpartition("-")[2])
            rank = _rank_of(runtime, attempt, local)
            if rank is not None:
                found[rank] = Seat(runtime, local)
    return found


def _runtimes(run_id: str, job: Path) -> list[Path]:
    found = []
    for root in {"/dev/shm", tempfile.gettempdir()}:
        for runtime in sorted(Path(root, f"everstep-{os.getuid()}").glob(f"{run_id[:12]}@*")):
            for name in (OWNER, MEMBER):
                with contextlib.suppress(OSError):
                    if (runtime / name).read_text() == str(job):
                        found.append(runtime)
    return found


def _rank_of(runtime: Path, attempt: int, local_rank: int) -> int | None:
    """As torchrun has told it; None where it is gone."""
    with contextlib.suppress(OSError, ValueError):
        page = ControlPage(page_path(runtime, attempt, local_rank))
        try:
            words = Path(f"/proc/{page[Word.PID]}/environ").read_bytes().split(b"\0")
        finally:
            page.close()
        return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
    return None
