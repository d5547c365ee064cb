"""How ``everstep simulate`` tells what it has found: as text, for programs, as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from launch.tables import columns
from supervisor.timesheet import Activity

if TYPE_CHECKING:
    from launch.simulate import Study
    from supervisor.decide.scenario import Outcome

DAY: Final = 86400.0


def mean(outcomes: Sequence[Outcome]) -> float:
    """The part of the wall time that is productive."""
    return statistics.fmean(outcome.effective for outcome in outcomes)


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over the runs, and each run."""
    return {
        "goodput": statistics.fmean(outcome.goodput for outcome in outcomes),
        "effective": mean(outcomes),
        "effective_least": min(outcome.effective for outcome in outcomes),
        "effective_most": max(outcome.effective for outcome in outcomes),
        "runs": [
            {
                "state": outcome.record.state.value,
                "reason": outcome.record.reason,
                "wall_seconds": outcome.seconds,
                "steps": outcome.record.step,
                "lost_steps": outcome.record.lost_steps,
                "restarts": outcome.record.restarts,
                "preemptions": outcome.record.preemptions,
                "checkpoints": outcome.checkpoints,
                "seconds": asdict(outcome.record.spent),
            }
            for outcome in outcomes
        ],
    }


def assumptions(study: Study) -> dict[str, Any]:
    """What was simulated, for programs."""
    plan = study.plan
    return {
        "mtbf": None if math.isinf(study.mtbf) else study.mtbf,
        "source": study.source,
        "shares": {blow.value: share for blow, share in study.shares.items() if share},
        "snapshot_every": plan.snapshot_every,
        "checkpoint_every": plan.checkpoint_every,
        "seconds": plan.seconds,
        "steps": plan.steps,
        "peers": plan.peers,
        "costs": asdict(study.costs),
        "measured": sorted(study.measured),
    }


def head(study: Study) -> list[str]:
    """What was simulated, in words."""
    plan, costs = study.plan, asdict(study.costs)
    ends = [f"{plan.steps:,} steps"] if plan.steps else []
    ends += [span(plan.seconds)] if plan.seconds else []
    often = "nothing fails" if math.isinf(study.mtbf) else f"a failure every {span(study.mtbf)} on average"
    shares = [
        f"{share:.0%} {blow}" for blow, share in study.shares.items() if share and not math.isinf(study.mtbf)
    ]
    rows = [
        f"{' or '.join(ends)}, {often} ({study.source})" + (f": {', '.join(shares)}" if shares else ""),
    ]
    for words, names in (
        ("measured", [name for name in costs if name in study.measured]),
        ("assumed", [name for name in costs if name not in study.measured]),
    ):
        if names:
            rows.append(
                f"{words}: " + ", ".join(f"{name.replace('_', ' ')} {span(costs[name])}" for name in names)
            )
    return rows


def text(study: Study, outcomes: Sequence[Outcome]) -> str:
    """One setting."""
    values = [outcome.effective for outcome in outcomes]
    goodput = statistics.fmean(outcome.goodput for outcome in outcomes)
    wall = statistics.fmean(outcome.seconds for outcome in outcomes)
    rows = []
    for activity in Activity:
        seconds = statistics.fmean(getattr(outcome.record.spent, activity.value) for outcome in outcomes)
        rows.append(["", activity.value, span(seconds), f"{seconds / wall:.2%}"])

    def average(pick: Callable[[Outcome], float]) -> str:
        return f"{statistics.fmean(map(pick, outcomes)):,.0f}"

    lines = [
        *head(study),
        "",
        f"goodput {goodput:.2%}; of the wall time {statistics.fmean(values):.2%} productive "
        f"({min(values):.2%} to {max(values):.2%} in {len(values)} runs)",
        *columns(rows, right=(2, 3)),
        f"steps {average(lambda one: one.record.step)}, done again {average(lambda one: one.record.lost_steps)}; "
        f"restarts {average(lambda one: one.record.restarts)}, preemptions {average(lambda one: one.record.preemptions)}; "
        f"checkpoints {average(lambda one: one.checkpoints)}",
    ]
    if gave_up := [outcome for outcome in outcomes if outcome.record.exit_code == 1]:
        lines.append(f"{len(gave_up)} of {len(outcomes)} runs gave up: {gave_up[0].record.reason}")
    return "\n".join(lines)


def sweep_text(study: Study, tried: Mapping[str, Sequence[Outcome]], best: str) -> str:
    """One setting a row."""
    rows = [["", "checkpoint every", "productive", "least", "most", "redone", "checkpoints"]]
    for every, outcomes in tried.items():
        values = [outcome.effective for outcome in outcomes]
        redone = statistics.fmean(outcome.record.spent.redone / outcome.seconds for outcome in outcomes)
        checkpoints = statistics.fmean(outcome.checkpoints for outcome in outcomes)
        rows.append(
            [
                "*" if every == best else "", every, f"{mean(outcomes):.2%}", f"{min(values):.2%}",
                f"{max(values):.2%}", f"{redone:.2%}", f"{checkpoints:,.0f}",
            ]
        )  # fmt: skip
    table = columns(rows, right=(2, 3, 4, 5, 6))
    return "\n".join(
        [*head(study), "", *table, f"* the best of the wall time, means of {len(study.seeds)} runs"]
    )


def draw(file: Path, tried: Mapping[str, Sequence[Outcome]], best: str) -> None:
    """The sweep as a picture. Raises StorageError."""
    from launch import plot

    points = [(place, 100 * mean(outcomes)) for place, outcomes in enumerate(tried.values())]
    names = list(tried)
    plot.write(
        file, "% of the wall time productive", points, best=names.index(best),
        axis=plot.Axis("checkpoint interval", dict(enumerate(names))),
    )  # fmt: skip


def span(seconds: float) -> str:
    """A time in the unit in which people would say it."""
    for unit, length in (("d", DAY), ("h", 3600.0), ("m", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
