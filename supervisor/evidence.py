"""``failure.json``: all that is known of an attempt that failed, for whoever wants to know more than the one line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from supervisor.edge import forensics
from supervisor.model import AttemptEvidence, Failure


def write(folder: Path, failure: Failure, evidence: AttemptEvidence) -> str | None:
    """Write it into the attempt's folder; returns why that could not be done, if so."""
    document = {"failure": asdict(failure), "evidence": asdict(evidence), "host": forensics.host_now()}
    file = folder / "failure.json"
    try:
        file.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        return f"{file}: {error.strerror}"
    return None
