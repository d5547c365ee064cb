"""``failure.json``: all that is known of an attempt that failed, for whoever wants to know more than the one line.

Stacks are shortened there, and whole in ``stacks/rank-<rank>.txt`` beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from supervisor.decide.stacks import shortened
from supervisor.edge import forensics
from supervisor.model import AttemptEvidence, Failure


def write(
    folder: Path, failure: Failure, evidence: AttemptEvidence, name: str = "failure.json"
) -> str | None:
    """Write it into the attempt's folder; returns why that could not be done, if so."""
    stacks = {rank: shortened(text) for rank, text in evidence.stacks.items()}
    document = {
        "failure": asdict(failure),
        "evidence": {**asdict(evidence), "stacks": stacks},
        "host": forensics.host_now(),
        "flight_records": _flight_records(folder),
    }
    file = folder / name
    try:
        for rank, text in evidence.stacks.items():
            file = folder / "stacks" / f"rank-{rank}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        file = folder / name
        file.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        return f"{file}: {error.strerror}"
    return None


def _flight_records(folder: Path) -> list[str]:
    try:
        return forensics.collect_flight_records(folder)
    except OSError:
        return []
