"""A job's status as Prometheus metrics: names and units by its conventions (https://prometheus.io/docs/practices/naming/).

What can only grow is a counter. Seconds by activity are gauges: a failure makes productive seconds into redone ones, and a
counter that shrinks would be taken for one that began anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from supervisor.about import version
from supervisor.errors import ConfigError
from supervisor.model import State
from supervisor.status import Status

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def check() -> None:
    """Raise ConfigError, naming the extra, where the library is missing."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise ConfigError("metrics need prometheus-client: pip install 'everstep[metrics]'") from None


def text(status: Status, hook_failures: int = 0) -> bytes:
    """In the text format of Prometheus."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            return families(status, hook_failures)

    registry = CollectorRegistry()
    registry.register(Once())
    return generate_latest(registry)


def families(status: Status, hook_failures: int = 0) -> Iterator[Metric]:
    """Every metric. All bear ``run`` (the run id) and ``name`` (the job directory's)."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    record = status.record
    names, own = ("run", "name"), (status.run_id or "", status.path.name)

    def gauge(name: str, about: str, value: float | None, unit: str = "") -> Iterator[Metric]:
        if value is not None:
            family = GaugeMetricFamily(f"everstep_{name}", about, labels=names, unit=unit)
            family.add_metric(own, value)
            yield family

    def counter(name: str, about: str, value: float) -> Iterator[Metric]:
        family = CounterMetricFamily(f"everstep_{name}", about, labels=names)
        family.add_metric(own, value)
        yield family

    def by(
        label: str, name: str, about: str, values: Mapping[Any, float], unit: str = ""
    ) -> Iterator[Metric]:
        family = GaugeMetricFamily(f"everstep_{name}", about, labels=(*names, label), unit=unit)
        for key, value in values.items():
            family.add_metric((*own, str(key)), value)
        if values:
            yield family

    yield from by("version", "build_info", "The supervisor's version, as a label.", {version(): 1})
    states = {state.value: float(state is status.state) for state in State if state is not State.NEW}
    yield from by("state", "state", "1 for the state that the job is in.", states)
    yield from gauge("attempt", "Number of the newest attempt, from 0.", record.attempt)
    yield from gauge("world_size", "Ranks of the newest attempt.", record.world_size)
    yield from gauge("step", "Completed steps; falls when a job resumes from an older state.", status.step)
    yield from gauge("total_steps", "Steps that there are to be.", status.total_steps)
    yield from gauge(
        "step_duration", "Seconds a step takes, over about a minute.", _inverse(status.rate), "seconds"
    )
    yield from counter(
        "restarts", "Attempts relaunched after a failure, over the job's life.", record.restarts
    )
    yield from counter("preemptions", "Stops by preemption, over the job's life.", record.preemptions)
    yield from counter("redone_steps", "Steps that were lost and had to be done again.", record.lost_steps)
    yield from gauge(
        "failures_left",
        "Failures without progress before it gives up.",
        _left(record.limits.max_failures, record.failures_since_progress),
    )
    yield from gauge(
        "preemptions_left",
        "Preemptions without progress before it gives up.",
        _left(record.limits.max_preemptions, record.preemptions_since_progress),
    )
    yield from gauge(
        "goodput",
        "Part of the supervised time that went into steps that still count.",
        status.spent.goodput,
        "ratio",
    )
    yield from by("activity", "time", "What the job's wall time went into.", asdict(status.spent), "seconds")
    for name, held in (("snapshot", status.snapshot), ("checkpoint", status.checkpoint)):
        if held is not None:
            yield from gauge(f"{name}_step", f"Completed steps in the newest {name}.", held.step)
            yield from gauge(
                f"{name}_timestamp", f"When the newest {name} was complete.", held.time, "seconds"
            )
    for name, about, point in (
        ("snapshot", "stall of the training for the newest snapshot that was noted", record.snapshot),
        ("checkpoint", "time to make the newest checkpoint durable", record.checkpoint),
    ):
        if point is not None and point.bytes:
            yield from gauge(f"{name}_duration", f"The {about}.", point.seconds, "seconds")
            yield from gauge(f"{name}_size", f"Of the newest {name}.", point.bytes, "bytes")
    yield from gauge(
        "checkpoint_failing",
        "1 while no newer checkpoint can be written.",
        float(record.drain_failure is not None),
    )
    if status.arenas is not None:
        memory = {
            "held": status.arenas.held,
            "needed": status.arenas.needed,
            "on_disk": status.arenas.on_disk,
            "free": status.arenas.free,
        }
        yield from by("kind", "snapshot_memory", "Memory of the snapshots on this node.", memory, "bytes")
    yield from by(
        "rank",
        "rank_own_time",
        "Part of the last minute that a rank did not spend waiting for others.",
        status.own_shares,
        "ratio",
    )
    yield from by("metric", "logged", "Newest values that the training has logged.", status.metrics)
    warnings = Counter(warning.kind.value for warning in record.warnings if status.alive)
    yield from by("kind", "warnings", "Early warnings that hold.", warnings)
    yield from counter("rollbacks", "Rollbacks by the numeric guard, over the job's life.", record.rollbacks)
    deadline = record.deadline.deadline if record.deadline is not None and status.alive else None
    yield from gauge("deadline_timestamp", "When the job is ended, where that is known.", deadline, "seconds")
    yield from counter(
        "hook_failures", "Hooks that failed or took too long, since this supervisor began.", hook_failures
    )


def _inverse(rate: float | None) -> float | None:
    return 1 / rate if rate and math.isfinite(rate) else None


def _left(allowed: int, used: int) -> int:
    return max(0, allowed - used)
