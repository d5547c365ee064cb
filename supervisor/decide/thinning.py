"""Fewer points that draw the same picture.

Of all points that fall into one column of the picture, the first, the lowest, the highest and the last are kept (M4: U. Jugel
et al., M4: A Visualization-Oriented Time Series Data Aggregation, PVLDB 7(10), 2014): a line drawn through them covers the
same pixels as one through all, and no spike is lost, however many points there are.
"""

from __future__ import annotations

from collections.abc import Sequence


def m4(xs: Sequence[float], ys: Sequence[float], low: float, high: float, columns: int) -> list[int]:
    """Indices of the points to keep, in order, for a picture of ``columns`` from ``low`` to ``high``; ``xs`` ascends.

    Raises ValueError for a picture without columns.
    """
    if columns < 1:
        raise ValueError(f"{columns} columns")
    if len(xs) <= 4:
        return list(range(len(xs)))
    scale = columns / (high - low) if high > low else 0.0
    kept: list[int] = []
    begin, column = 0, _column(xs[0], low, scale, columns)
    for index in range(1, len(xs) + 1):
        here = _column(xs[index], low, scale, columns) if index < len(xs) else -1
        if here != column:
            part = range(begin, index)
            lowest, highest = min(part, key=ys.__getitem__), max(part, key=ys.__getitem__)
            kept += sorted({begin, lowest, highest, index - 1})
            begin, column = index, here
    return kept


def _column(x: float, low: float, scale: float, columns: int) -> int:
    return min(columns - 1, max(0, int((x - low) * scale)))
