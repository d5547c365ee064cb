"""What a snapshot costs against the number of tensors and of ranks: the first one, which is planned, and every later one.

Small tensors, so that what is measured is the work for each tensor and each rank, and not the copying of bytes. Ranks are
gloo processes with 300 tensors each that stay in step at each snapshot; more of them than there are cores wait for each
other's turns, too. Writes a plot.

    python benchmarks/snapshot_scale.py [--plot docs/snapshot-cost.svg] [--rounds 5]
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.snapshot import scratch
from benchmarks.training import Training, World, free_port, ours

TENSORS = [100, 300, 1000, 3000, 10_000]
RANKS = [1, 2, 4, 8]
AGREEMENTS = 200
Point = tuple[int, float]
Curves = dict[str, list[Point]]
COLOURS = ["#b33", "#27c", "#292", "#a6f"]
mp: Any = torch.multiprocessing


@dataclass(frozen=True)
class Measured:
    """Seconds: the first snapshot, the median of later ones, and of agreements, with the longest of nine in ten of those."""

    first: float
    later: float
    agreed: tuple[float, float] = (0.0, 0.0)
    reduced: tuple[float, float] = (0.0, 0.0)


def work(rank: int, ranks: int, tensors: int, rounds: int, port: int, root: Path, results: Any) -> None:
    """One rank."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks),
    }  # fmt: skip
    dist.init_process_group("gloo")
    training = Training(0, small=True, batch=8, layers=max(1, tensors // 6))
    world = World()
    found, first = ours(training, world, root, rounds, behind=True)
    agreed, reduced = agreements(world) if world.group is not None else ((0.0, 0.0), (0.0, 0.0))
    results.put(Measured(first[0], statistics.median(found["stall"]), agreed, reduced))
    dist.barrier()


def agreements(world: World) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ours, and gloo's."""

    def reduce(numbers: list[int]) -> None:
        dist.all_reduce(torch.tensor(numbers), op=dist.ReduceOp.MAX, group=world.group)

    took: tuple[list[float], list[float]] = ([], [])
    for number in range(AGREEMENTS):
        for agree, times in zip((world.largest, reduce), took, strict=True):
            dist.barrier()
            started = time.perf_counter()
            agree([number, -number, 0, world.rank, 1, 0])
            times.append(time.perf_counter() - started)
    ours, gloos = ((statistics.median(times), sorted(times)[len(times) * 9 // 10]) for times in took)
    return ours, gloos


def measure(ranks: int, tensors: int, rounds: int) -> Measured:
    """Of each figure, the worst rank's."""
    context = mp.get_context("spawn")
    with scratch() as root:
        results = context.SimpleQueue()
        arguments = (ranks, tensors, rounds, free_port(), root, results)
        mp.spawn(work, arguments, ranks)
        answers = [results.get() for _ in range(ranks)]
    return Measured(
        max(one.first for one in answers),
        max(one.later for one in answers),
        max(one.agreed for one in answers),
        max(one.reduced for one in answers),
    )


def panel(curves: Curves, left: float, title: str, unit: str) -> str:
    """One plot, both axes logarithmic; milliseconds against ``unit``."""
    width, height, top = 300.0, 220.0, 50.0
    points = [point for curve in curves.values() for point in curve]
    low_x, high_x = math.log(min(x for x, _ in points)), math.log(max(x for x, _ in points))
    decades = [
        math.floor(math.log10(min(y for _, y in points))),
        math.ceil(math.log10(max(y for _, y in points))),
    ]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - decades[0]) / (decades[1] - decades[0])
        return left + across * width, top + height * (1 - up)

    parts = [f'<text x="{left}" y="24" font-weight="bold">{title}</text>']
    for decade in range(decades[0], decades[1] + 1):
        _, y = place(math.exp(low_x), 10.0**decade)
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#8886"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**decade:g} ms</text>')
    for x in sorted({x for x, _ in points}):
        at, _ = place(x, 10.0 ** decades[0])
        parts.append(f'<text x="{at:.1f}" y="{top + height + 18}" text-anchor="middle">{x:,}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">{unit}</text>')
    colours = dict(zip(curves, COLOURS, strict=False))
    for name, curve in curves.items():
        line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
    below = 0.0
    ends = ((place(*curve[-1])[1], name) for name, curve in curves.items())
    for y, name in sorted(ends):
        below = max(y, below + 14)  # no name over another
        parts.append(f'<text x="{left + width + 6}" y="{below + 4:.1f}" fill="{colours[name]}">{name}</text>')
    return "\n".join(parts)


def plot(panels: Sequence[tuple[Curves, str, str]]) -> str:
    """The panels side by side, as SVG."""
    drawn = [panel(curves, 70 + 470 * number, *words) for number, (curves, *words) in enumerate(panels)]
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {470 * len(panels)} 320" '
        f'font-family="sans-serif" font-size="12" fill="#888">\n{body}\n</svg>\n'
    )


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plot", type=Path, help="where to write the SVG")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{'':42}{'agreeing, ms (of nine in ten, up to)':>40}")
    print(f"{'ranks':>6}{'tensors each':>14}{'first, ms':>11}{'later, ms':>11}{'ours':>20}{'gloo':>20}")
    curves: list[Curves] = []
    for cases in ([(1, tensors) for tensors in TENSORS], [(ranks, 300) for ranks in RANKS]):
        by_ranks = len(cases) == len(RANKS)
        found: Curves = {"the first": [], "each later": []}
        for ranks, tensors in cases:
            one = measure(ranks, tensors, options.rounds)
            line = f"{ranks:6}{tensors:14,}{one.first * 1e3:11.1f}{one.later * 1e3:11.2f}"
            x = ranks if by_ranks else tensors
            found["the first"].append((x, one.first * 1e3))
            found["each later"].append((x, one.later * 1e3))
            for name, (median, most) in (("agreeing", one.agreed), ("all_reduce", one.reduced)):
                if ranks > 1:
                    line += f"{f'{median * 1e3:.3f} ({most * 1e3:.2f})':>20}"
                    found.setdefault(name, []).append((x, median * 1e3))
            print(line, flush=True)
        curves.append(found)
    if options.plot:
        words = [("stall, one rank", "tensors"), ("stall, 300 tensors on each rank", "ranks")]
        options.plot.write_text(plot([(c, *w) for c, w in zip(curves, words, strict=True)]))


if __name__ == "__main__":
    main()
