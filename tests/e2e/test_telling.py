"""A real run that fails once and is preempted, under a real Prometheus, with hooks."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor.model import FirstStep
from tests.e2e.harness import DEADLINE, Job, torchrun
from tests.telling.test_hooks import Endpoint
from tests.telling.test_metrics import DEPLOY, dashboard, promtool


class Prometheus:
    """A server of one's own on a free port."""

    def __init__(self, folder: Path, target: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        shutil.copy(DEPLOY / "everstep.rules.yml", folder)
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [everstep.rules.yml]\n"
            f"scrape_configs: [{{job_name: everstep, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        argv = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"]  # fmt: skip
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Of the one series that it yields; None while there is none."""
        with contextlib.suppress(OSError):  # it is just starting
            found = self.ask("query", query=expression)["result"]
            return float(found[0]["value"][1]) if found else None
        return None

    def until(self, expression: str) -> float:
        deadline = time.monotonic() + DEADLINE
        while (value := self.value(expression)) is None:
            assert time.monotonic() < deadline, f"never: {expression}"
            assert self.process.poll() is None
            time.sleep(0.1)
        return value


@pytest.fixture
def webhook() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_tells_how_it_stands(job: Job, tmp_path: Path, webhook: Endpoint) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus")
    told = tmp_path / "told.jsonl"
    file = tmp_path / "train.prom"
    job.start(
        torchrun("--out", tmp_path / "out", "--steps", 100_000, "--pause", "0.05"),
        "--snapshot-every", "5steps", "--metrics-port", "0", "--metrics-file", file,
        "--hook", f"sh -c 'cat >> {told}'", "--hook", f"failure={webhook.url}", "--hook", "failure=false",
        faults=[{"attempt": 0, "rank": 1, "step": 12, "kind": "SIGKILL"}],
    )  # fmt: skip
    target = job.until(lambda: re.search(r"metrics at http://(127\.0\.0\.1:\d+)/metrics", job.output))[1]
    (tmp_path / "prometheus").mkdir()
    prometheus = Prometheus(tmp_path / "prometheus", target)
    try:
        job.until_fact(FirstStep, lambda fact: fact.attempt == 1)
        name = f'{{name="{job.folder.name}"}}'
        assert prometheus.until(f"everstep_restarts_total{name} == 1") == 1
        assert prometheus.until(f"everstep_step{name} > 12") > 12
        assert prometheus.until(f"everstep_hook_failures_total{name} == 1") == 1
        assert 0 < prometheus.until(f"everstep_goodput_ratio{name} > 0") < 1
        for expression in dashboard():
            prometheus.ask("query", query=expression.replace("$name", ".*").replace("$run", ".*"))
        rules = prometheus.ask("rules")["groups"][0]["rules"]
        assert len(rules) > 5
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
        assert "firing" not in {rule["state"] for rule in rules}  # it has failed just now: one may be pending
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=60) as answer:
            assert promtool("check", "metrics", text=answer.read()) == ""
        job.signal(signal.SIGTERM)
        assert job.wait() == 75, job.output
    finally:
        prometheus.process.terminate()
        prometheus.process.wait(60)
    events = [json.loads(line) for line in told.read_text().splitlines()]
    assert [event["event"] for event in events] == ["failure", "preempted"]
    assert (events[0]["failure"]["kind"], events[0]["failure"]["rank"], events[0]["action"]) == (
        "crash",
        1,
        "restart",
    )
    assert events[1]["checkpoint"]["step"] == job.record.step
    assert [(path, body["event"]) for path, _, body in webhook.taken] == [("/hook/s3cret", "failure")]
    assert job.output.count("hook failure=false failed with exit code 1") == 1
    assert (
        "s3cret"
        not in job.output + (job.folder / "journal").joinpath(f"{socket.gethostname()}.jsonl").read_text()
    )
    last = file.read_text()
    assert re.search(r'everstep_state\{[^}]*state="preempted"\} 1\.0', last)
    assert promtool("check", "metrics", text=last.encode()) == ""
