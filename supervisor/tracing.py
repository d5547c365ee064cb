"""A run as OpenTelemetry spans: one for the run, below it one for each attempt, with what happened in it as their events.

It hears the facts of the journal and takes their times, so a trace is what the journal says. Where it goes is said by
OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``…_HEADERS``, ``OTEL_SERVICE_NAME``), over HTTP. A thread of the SDK
sends it in batches: what nobody takes is dropped, and that is said once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Final

from supervisor import model
from supervisor.about import version
from supervisor.errors import ConfigError
from supervisor.model import AttemptEnded, AttemptStarted, Decided, Fact, RunEnded, RunStarted, WorkersReady

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

#: what is told as an event of the span in which it falls
EVENTS: Final = {
    model.Resumed: "resumed", model.FirstStep: "first step", model.CheckpointCommitted: "checkpoint committed",
    model.CheckpointFailed: "checkpoint failed", model.CheckpointRejected: "checkpoint rejected",
    model.NoticeReceived: "notice", model.NoticeWithdrawn: "notice withdrawn", model.StopRequested: "stop requested",
    model.StopWithdrawn: "stop withdrawn", model.StatesCondemned: "states condemned", model.WarningRaised: "warning",
}  # fmt: skip
_LOGGER: Final = "opentelemetry"


def otlp() -> SpanExporter:
    """Over HTTP, to where the environment says. Raises ConfigError, naming the extra, where the library is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "--otel needs OpenTelemetry's SDK and exporter: pip install 'everstep[otel]'"
        ) from None
    return OTLPSpanExporter()


class Tracing:
    """``hear`` takes every fact of a run in order. ``about``: attributes of the resource; ``report`` is told what goes wrong."""

    def __init__(
        self, exporter: SpanExporter, about: Mapping[str, str], report: Callable[[str], None]
    ) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        logger = logging.getLogger(_LOGGER)
        logger.propagate, logger.handlers = False, [_Once(report)]
        service = {
            "service.name": os.environ.get("OTEL_SERVICE_NAME", "everstep"),
            "service.version": version(),
        }
        self._provider = TracerProvider(
            resource=Resource.create({**service, **about}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("everstep", version())
        self._run: Span | None = None
        self._attempt: Span | None = None
        self._ended = 0  # nanoseconds, when the attempt was over

    def hear(self, fact: Fact) -> None:
        """One more fact."""
        from opentelemetry import trace

        now, span = int(fact.time * 1e9), self._attempt or self._run
        if isinstance(fact, RunStarted):
            self._run = self._tracer.start_span(
                "run", start_time=now, attributes={"everstep.epoch": fact.epoch}
            )
        elif isinstance(fact, AttemptStarted) and self._run is not None:
            above = trace.set_span_in_context(self._run)
            self._attempt = self._tracer.start_span(
                f"attempt {fact.attempt}", above, start_time=now, attributes=_plain(fact)
            )
        elif span is None:
            return
        elif isinstance(fact, WorkersReady | AttemptEnded):
            span.set_attributes(_plain(fact))
            self._ended = now
            if isinstance(fact, AttemptEnded) and fact.failure is not None:
                span.set_attribute("error.type", fact.failure.kind.value)
                span.set_status(trace.StatusCode.ERROR, fact.failure.reason)
        elif isinstance(fact, Decided):
            span.set_attributes({"everstep.action": fact.action.value, "everstep.reason": fact.reason})
            if self._attempt is not None:
                self._attempt.end(self._ended)
            self._attempt = None
        elif isinstance(fact, RunEnded):
            span.set_attributes(_plain(fact))
            if fact.exit_code == 1:
                span.set_status(trace.StatusCode.ERROR, fact.reason)
            span.end(now)
        elif type(fact) in EVENTS:
            span.add_event(EVENTS[type(fact)], _plain(fact), now)

    def close(self) -> None:
        """Send what is left. Takes as long as the exporter's own limits let it."""
        self._provider.shutdown()


def _plain(fact: Fact) -> dict[str, str | int | float | bool]:
    """Its plain values as attributes."""
    values = {field.name: getattr(fact, field.name) for field in fields(fact)}
    return {
        f"everstep.{name}": value
        for name, value in values.items()
        if name != "time" and isinstance(value, str | int | float)
    }


class _Once(logging.Handler):
    """The first problem, in one line."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._report: Callable[[str], None] | None = report

    def emit(self, record: logging.LogRecord) -> None:
        if self._report is not None:
            self._report(f"OpenTelemetry: {record.getMessage().splitlines()[0]}")
        self._report = None
