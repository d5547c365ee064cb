"""Traces: what a journal tells becomes spans, a collector is sent them by its own protocol, and none of it harms the run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from supervisor.errors import ConfigError
from supervisor.model import AttemptEnded, Decided, Fact, RunEnded, WarningKind, WarningRaised
from supervisor.tracing import Tracing, otlp
from tests.e2e import harness
from tests.journals import journals
from tests.report.stories import life


def spans_of(facts: list[Fact]) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, {"everstep.run_id": "r"}, pytest.fail)
    for fact in facts:
        tracing.hear(fact)
    tracing.close()
    return list(exporter.get_finished_spans())


@given(journals())
@settings(max_examples=25)
def test_each_attempt_is_a_span_below_its_run(facts: list[Fact]) -> None:
    """Whatever happened to it; one whose end no supervisor saw is not told."""
    ends: list[AttemptEnded] = []
    last: AttemptEnded | None = None
    for fact in facts:
        last = fact if isinstance(fact, AttemptEnded) else last
        if isinstance(fact, Decided) and last is not None:
            ends.append(last)
            last = None
    spans = spans_of(facts)
    attempts = [span for span in spans if span.name != "run"]
    runs = {span.context.span_id: span for span in spans if span.name == "run"}
    assert len(runs) == sum(isinstance(fact, RunEnded) for fact in facts)
    assert [span.name for span in attempts] == [f"attempt {fact.attempt}" for fact in ends]
    for span, fact in zip(attempts, ends, strict=True):
        assert span.end_time == int(fact.time * 1e9)
        assert (span.status.status_code is StatusCode.ERROR) is (fact.failure is not None)
        assert span.parent is not None
        if (run := runs.get(span.parent.span_id)) is not None:
            assert run.context.trace_id == span.context.trace_id


def test_what_happens_in_an_attempt_is_an_event_of_it() -> None:
    facts = life(attempts=2, total=100, every=10, pace=1.0)
    warning = WarningRaised(time=facts[5].time, attempt=0, kind=WarningKind.NAN, step=3, text="loss is nan")
    first, second, run = spans_of([*facts[:6], warning, *facts[6:]])
    assert (first.name, second.name, run.name) == ("attempt 0", "attempt 1", "run")
    assert first.attributes is not None
    assert first.attributes["everstep.action"] == "restart"
    (event,) = (event for event in first.events if event.name == "warning")
    assert event.attributes == {
        "everstep.attempt": 0, "everstep.kind": "nan", "everstep.step": 3, "everstep.text": "loss is nan",
    }  # fmt: skip
    assert event.timestamp == int(warning.time * 1e9)
    assert "resumed" in [event.name for event in second.events]
    assert first.resource.attributes["service.name"] == "everstep"
    assert first.resource.attributes["everstep.run_id"] == "r"


class Collector(ThreadingHTTPServer):
    """Takes what OTLP over HTTP sends."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_sends_itself_to_a_collector(tmp_path: Path, collector: Collector) -> None:
    script = tmp_path / "fails_once.py"
    script.write_text(
        "import os, sys\nsys.exit(os.environ['EVERSTEP_ATTEMPT'] == '0' and 'on purpose' or 0)\n"
    )
    with harness.job(tmp_path / "job") as job:
        job.environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        }
        assert job.run([sys.executable, str(script)], "--otel", "--standby", "off") == 0, job.output
        started = job.facts()[0].time
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    resources = [one for _, request in collector.requests for one in request.resource_spans]
    spans = {span.name: span for one in resources for scope in one.scope_spans for span in scope.spans}
    assert spans.keys() == {"run", "attempt 0", "attempt 1"}
    run = spans.pop("run")
    assert run.start_time_unix_nano == int(started * 1e9)
    assert [span.status.code for span in spans.values()] == [2, 0]  # an error, and unset
    for span in spans.values():
        assert (span.trace_id, span.parent_span_id) == (run.trace_id, run.span_id)
    named = {one.key: one.value.string_value for one in resources[0].resource.attributes}
    assert (named["service.name"], named["everstep.name"]) == ("everstep", "job")


def test_where_nobody_listens_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    said: list[str] = []
    tracing = Tracing(otlp(), {}, said.append)
    for fact in life(attempts=2, total=100, every=10, pace=1.0):
        tracing.hear(fact)
    tracing.close()
    (line,) = said
    assert line.startswith("OpenTelemetry: ")
    assert "\n" not in line


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'everstep\[otel\]'"):
        otlp()
