"""Words and columns that the commands about checkpoints have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell; the columns ``right`` flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = set(right)
    return [
        "  ".join(
            cell.rjust(width) if number in to_the_right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def number(value: float | None) -> float | None:
    """A number for JSON: None for what is not finite."""
    return value if value is None or math.isfinite(value) else None


def print_json(document: object) -> None:
    """On standard output."""
    print(json.dumps(document, indent=2, allow_nan=False))
