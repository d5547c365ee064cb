"""Small checkpoints to damage, and the words to say so."""

from __future__ import annotations

import random
from pathlib import Path

from supervisor.checkpoint.copying import Retries
from supervisor.checkpoint.manifest import Origin


def origin(step: int, **changes: object) -> Origin:
    """Where a checkpoint of ``step`` might come from."""
    values: dict[str, object] = {
        "step": step,
        "attempt": 2,
        "epoch": 1,
        "run_id": "run-1",
        "world_size": 2,
        "created": 1_700_000_000.25,
        "metrics": {"loss": 1.5},
        "versions": {"torch": "2.13.0", "everstep": "0.1.0", "python": "3.11.7"},
    }
    return Origin(**{**values, **changes})  # type: ignore[arg-type]


def write_source(directory: Path, *, seed: int = 0, size: int = 3000, ranks: int = 2) -> Path:
    """Files named as DCP names them, with bytes that depend on ``seed``."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for rank in range(ranks):
        (directory / f"__{rank}_0.distcp").write_bytes(generator.randbytes(size + rank))
    (directory / ".metadata").write_bytes(generator.randbytes(100))
    (directory / "slot.json").write_text("{}")  # of the snapshot, not of the checkpoint
    return directory


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file, as a bad cable would: size and times stay."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def at_once(budget: int = 10) -> Retries:
    """Retries that do not wait."""
    return Retries(budget=budget, sleep=lambda seconds: None)
