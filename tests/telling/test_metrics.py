"""Metrics: what they say, their form, and how they are offered. The rules and the dashboard in deploy/ are checked with promtool."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from supervisor import metrics
from supervisor.decide import lifecycle
from supervisor.edge.arenas import Arenas
from supervisor.edge.exposing import Endpoint, TextFile
from supervisor.errors import ConfigError
from supervisor.model import DeadlineSet, Fact, WarningKind, WarningRaised
from supervisor.status import Status, describe
from tests.journals import journals
from tests.report.stories import life

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy" / "prometheus"
ARENAS = Arenas(place="/dev/shm", slots=3, slot=100, held=200, on_disk=0, free=10**9, limit=None)


def status_of(facts: list[Fact]) -> Status:
    record = lifecycle.fold(facts)
    return describe(Path("/jobs/gpt"), record, record.last_time or 0.0, alive=True, run_id="abc")


def full() -> Status:
    """One that has something to say everywhere."""
    status = status_of(life(attempts=7, total=7000, every=10, pace=0.5)[:-4])
    warning = WarningRaised(
        time=status.now, attempt=6, kind=WarningKind.SPIKE, step=6500, text="the loss jumped"
    )
    deadline = DeadlineSet(time=status.now, source="slurm time limit", deadline=status.now + 600)
    record = status.record.with_(warnings=(warning,), deadline=deadline)
    return replace(status, record=record, own_shares={0: 0.5, 1: 0.9}, arenas=ARENAS)


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") in ("abc", "")
            assert labels.pop("name") == "gpt"
            key = (sample.name, *labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def promtool(*words: object, text: bytes = b"") -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("needs promtool")
    result = subprocess.run(
        [program, *map(str, words)], input=text, capture_output=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return (result.stdout + result.stderr).decode()


def test_what_they_say() -> None:
    status = full()
    found = samples(metrics.text(status, hook_failures=2))
    record = status.record
    assert found["everstep_state", "running"] == 1
    assert sum(value for key, value in found.items() if key[0] == "everstep_state") == 1
    assert found["everstep_step",] == status.step
    assert found["everstep_total_steps",] == 7000
    assert found["everstep_step_duration_seconds",] == pytest.approx(1 / (status.rate or 0))
    assert found["everstep_restarts_total",] == record.restarts == 6
    assert found["everstep_redone_steps_total",] == record.lost_steps
    assert found["everstep_goodput_ratio",] == pytest.approx(status.spent.goodput)
    assert sum(v for k, v in found.items() if k[0] == "everstep_time_seconds") == pytest.approx(
        status.spent.total
    )
    assert found["everstep_checkpoint_size_bytes",] == 7.4e9
    assert found["everstep_rank_own_time_ratio", "1"] == 0.9
    assert found["everstep_snapshot_memory_bytes", "needed"] == 300
    assert found["everstep_logged", "loss"] == pytest.approx(status.metrics["loss"])
    assert found["everstep_warnings", "spike"] == 1
    assert found["everstep_deadline_timestamp_seconds",] == status.now + 600
    assert found["everstep_hook_failures_total",] == 2


@given(journals(), st.sampled_from([float("nan"), float("inf"), 0.5]))
@settings(max_examples=30)
def test_every_job_can_be_told_of(facts: list[Fact], loss: float) -> None:
    status = replace(status_of(facts), metrics={"loss": loss, 'a "quoted"\\\n name': 1.0})
    found = samples(metrics.text(status))
    assert all(value >= 0 for key, value in found.items() if key[0].endswith("_total"))
    assert repr(found["everstep_logged", "loss"]) == repr(loss)


def test_names_and_units_are_by_the_conventions() -> None:
    assert promtool("check", "metrics", text=metrics.text(full())) == ""


def test_rules_and_configuration() -> None:
    assert "SUCCESS" in promtool("check", "config", DEPLOY / "prometheus.yml")
    assert "SUCCESS" in promtool("test", "rules", DEPLOY / "everstep.rules.test.yml")


def dashboard() -> list[str]:
    """Every expression of it."""
    plain: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in plain["panels"] for target in panel["targets"]]
    return expressions + [each["expr"] for each in plain["annotations"]["list"]]


def test_what_dashboard_and_alerts_ask_for_exists() -> None:
    there = {key[0] for key in samples(metrics.text(full()))}
    expressions = [*dashboard(), (DEPLOY / "everstep.rules.yml").read_text()]
    asked = set(re.findall(r"\beverstep_\w+", " ".join(expressions)))
    assert len(asked) > 15
    assert asked <= there
    alerts = set(re.findall(r"alert: (\w+)", expressions[-1]))
    tested = (DEPLOY / "everstep.rules.test.yml").read_text()
    assert all(
        tested.count(f"alertname: {name}") == 2 for name in alerts
    )  # that it comes, and that it does not


# --------------------------------------------------------------------------- how they are offered


def ask(port: int, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.getheader("Content-Type", ""), answer.read()


def test_the_endpoint() -> None:
    endpoint = Endpoint("127.0.0.1", 0, lambda: b"everstep_step 1\n", metrics.CONTENT_TYPE)
    try:
        assert ask(endpoint.server_port, "/metrics") == (200, metrics.CONTENT_TYPE, b"everstep_step 1\n")
        assert ask(endpoint.server_port, "/metrics?x=1")[0] == 200
        assert ask(endpoint.server_port, "/")[0] == 404
        assert ask(endpoint.server_port, "/metrics", "POST")[0] == 501
        with pytest.raises(ConfigError, match="Address already in use"):
            Endpoint("127.0.0.1", endpoint.server_port, lambda: b"", metrics.CONTENT_TYPE)
    finally:
        endpoint.close()
    with pytest.raises(ConnectionRefusedError):
        ask(endpoint.server_port, "/metrics")


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    said: list[str] = []
    numbers = iter(range(10))
    file = TextFile(tmp_path / "x.prom", lambda: b"%d\n" % next(numbers), said.append)
    assert (tmp_path / "x.prom").read_bytes() == b"0\n"
    file.close()
    assert (tmp_path / "x.prom").read_bytes() == b"1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.prom"]
    assert said == []


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        TextFile(tmp_path / "no" / "x.prom", lambda: b"", lambda line: None)
    (tmp_path / "there").mkdir()
    said: list[str] = []
    file = TextFile(tmp_path / "there" / "x.prom", lambda: b"", said.append)
    shutil.rmtree(tmp_path / "there")
    file.close()
    assert said == [
        f"--metrics-file {tmp_path}/there/x.prom: No such file or directory; the run goes on without"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metrics-port", "70000"], "'70000' is no port"),
        (["--metrics-port", "x"], "'x' is no port"),
        (["--metrics-file", "x.txt"], "ending in .prom"),
        (["--metrics-file", "/no/such/x.prom"], "No such file or directory"),
        (["--metrics-port", "0", "--metrics-address", "192.0.2.1"], "Cannot assign requested address"),
        (["--hook", "never=x"], "unknown event 'never'"),
        (["--hook", "no-such-command x"], "no command 'no-such-command'"),
        (["--hook", "true", "--hook-timeout", "0.1s"], "1s or longer"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    program = tmp_path / "script.py"
    program.write_text("raise SystemExit('started')\n")
    argv = [
        sys.executable,
        "-m",
        "launch.cli",
        "run",
        "--dir",
        str(tmp_path / "job"),
        *words,
        "python",
        str(program),
    ]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 78
    assert "Traceback" not in result.stderr
    assert said in result.stderr.splitlines()[-1]
    assert "started" not in result.stderr


def test_without_metrics_their_library_is_not_imported() -> None:
    program = (
        "import sys\n"
        "from supervisor import node, herald\n"
        "assert not {'prometheus_client', 'http.server', 'urllib.request'} & set(sys.modules)\n"
        "sys.modules['prometheus_client'] = None  # an import of it raises\n"
        "from supervisor import metrics\n"
        "from supervisor.errors import ConfigError\n"
        "try: metrics.check()\n"
        "except ConfigError as error: assert 'everstep[metrics]' in str(error), error\n"
        "else: sys.exit('not refused')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
