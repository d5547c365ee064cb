"""A metric over checkpoints, drawn without a plotting library: as one line of text, or as SVG alone or in HTML.

The picture is self-contained, follows the reader's light or dark scheme, and says each point's step and value to a mouse
and to a screen reader.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from supervisor.errors import StorageError, UsageError

_BARS = "▁▂▃▄▅▆▇█"
_WIDE = 60  # columns of a line of bars
_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 30, 46, 44
#: plain colours, and others for the dark: what draws SVG outside a browser knows no variables
_STYLE = """
  .plot text { font: 12px system-ui, sans-serif; fill: #1d2733 }
  .plot .title { font-size: 15px; font-weight: 600 }
  .plot .ground { fill: #ffffff } .plot .grid { stroke: #d5dbe3 }
  .plot .line { fill: none; stroke: #2563c9; stroke-width: 1.8 }
  .plot .point { fill: #2563c9 } .plot .best { fill: #c2410c }
  .plot .mark { fill: none; stroke: #1d2733; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    .plot text { fill: #e4e9f0 } .plot .ground { fill: #141a22 } .plot .grid { stroke: #3a4553 }
    .plot .line { stroke: #7db0ff } .plot .point { fill: #7db0ff } .plot .best { fill: #ff9d5c } .plot .mark { stroke: #e4e9f0 }
  }
"""

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Axis:
    """What lies to the right: ``names`` of the points' places, where these are not steps of a training."""

    title: str
    names: Mapping[int, str]

    def of(self, place: float) -> str:
        """What is said of a place."""
        return self.names.get(int(place), "")


def check_file(file: Path | None) -> None:
    """Refuse what cannot be written. Raises UsageError."""
    if file is not None and file.suffix.lower() not in (".svg", ".html"):
        raise UsageError(f"{file}: a plot is written to a file ending in .svg or .html")


def points_of(metric: str, metrics: Mapping[int, Mapping[str, float]]) -> Points:
    """Step and value, in order; what is not finite is left out. Raises UsageError where no checkpoint has it."""
    points = [(step, values[metric]) for step, values in sorted(metrics.items()) if metric in values]
    if not points:
        known = ", ".join(sorted({name for values in metrics.values() for name in values})) or "none"
        raise UsageError(f"no checkpoint has a metric {metric!r}; there are: {known}")
    return [(step, value) for step, value in points if math.isfinite(value)]


def line(metric: str, points: Points) -> str:
    """One line of bars, the lowest value being the lowest bar; where there are many points, means of neighbours."""
    if not points:
        return f"{metric}: no finite value"
    values = [value for _, value in points]
    low, high = min(values), max(values)
    shown = values
    if len(values) > _WIDE:
        edges = [len(values) * column // _WIDE for column in range(_WIDE + 1)]
        shown = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    top = len(_BARS) - 1
    bars = "".join(_BARS[round((value - low) / (high - low) * top) if high > low else 0] for value in shown)
    return f"{metric}  {bars}  {values[0]:.4g} at step {points[0][0]} to {values[-1]:.4g} at {points[-1][0]}; {low:.4g} to {high:.4g}"


def write(
    file: Path,
    metric: str,
    points: Points,
    *,
    best: int | None,
    marked: Collection[int] = (),
    axis: Axis | None = None,
) -> None:
    """An SVG, or an HTML page that holds it. Raises StorageError."""
    picture = svg(metric, points, best=best, marked=marked, axis=axis)
    if file.suffix.lower() == ".html":
        title = html.escape(f"{metric} over {axis.title if axis else 'checkpoints'}")
        picture = (
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
            f"<title>{title}</title>\n"
            "<style>:root { color-scheme: light dark } body { margin: 1rem; max-width: 60rem } svg { width: 100%; height: auto }"
            f"</style>\n{picture}</html>\n"
        )
    try:
        file.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{file}: {error.strerror or error}") from error


def svg(
    metric: str,
    points: Points,
    *,
    best: int | None,
    marked: Collection[int] = (),
    axis: Axis | None = None,
) -> str:
    """Steps (or the places of ``axis``) to the right, values upwards; the best one coloured, ``marked`` steps ringed."""
    steps = [step for step, _ in points] or [0]
    values = [value for _, value in points] or [0.0]
    across = sorted(axis.names) if axis else ticks(min(steps), max(steps), 6)
    up = ticks(min(values), max(values), 5)

    def x(step: float) -> float:
        return round(_LEFT + _part(step, min(steps), max(steps)) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - _part(value, up[0], up[-1]) * (_HEIGHT - _TOP - _BOTTOM), 1)

    name = html.escape(metric)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{name} over {html.escape(axis.title) if axis else f"{len(points)} checkpoints"}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="24">{name}</text>',
    ]
    for value in up:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value)}" y2="{y(value)}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{value:.6g}</text>')
    parts += [
        f'<text x="{x(step)}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{html.escape(axis.of(step)) if axis else f"{step:.0f}"}</text>'
        for step in across
        if min(steps) <= step <= max(steps) and step == int(step)
    ]
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{html.escape(axis.title) if axis else "step"}</text>'
    )
    parts.append(
        f'<polyline class="line" points="{" ".join(f"{x(step)},{y(value)}" for step, value in points)}"/>'
    )
    for step, value in points:
        if step in marked:
            parts.append(f'<circle class="mark" cx="{x(step)}" cy="{y(value)}" r="7"/>')
        kind, note = ("best", ", the best") if step == best else ("point", "")
        parts.append(
            f'<circle class="{kind}" cx="{x(step)}" cy="{y(value)}" r="{4.5 if note else 3}">'
            f"<title>{axis.of(step) if axis else f'step {step}'}: {value:.6g}{note}</title></circle>"
        )
    return "\n".join(parts) + "\n</svg>\n"


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about ``count`` round numbers that enclose ``low`` and ``high``."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [round(number * unit, 12) for number in range(first, last + 1)]


def _part(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5
