"""``everstep doctor``: what it finds on this host, on storage that fails or hangs, and on clusters as they are configured."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch import cli, doctor, probes
from launch.slurm import examining, fitness, shown
from supervisor.decide import fitness as judgements
from supervisor.decide.fitness import Door, Finding, Level, ok
from supervisor.errors import StorageError
from tests.launch.test_slurm import HET, show
from tests.notices.emulators import AwsEmulator, AzureEmulator, Emulator, GcpEmulator
from tests.store import etcd as etcds
from tests.stores import proxy as proxies
from tests.stores.fixtures import WITH_S3


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither a job nor a cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = cli.call(["doctor", "--json", *words])
    findings = json.loads(capsys.readouterr().out)
    return code, {finding["check"]: finding for finding in findings}


def test_a_host_is_looked_at_and_left_as_it_was(capsys: pytest.CaptureFixture[str], nowhere: Path) -> None:
    code, found = call(capsys, "--dir", "new/job")
    broken = [name for name, finding in found.items() if finding["level"] == "broken"]
    assert code == bool(broken)
    expected = {
        "/dev/shm",
        "memory",
        "open files",
        "processes",
        "locked memory",
        "ports",
        "clock",
        "job directory",
        "torch",
    }
    assert found.keys() == expected
    assert str(nowhere) in found["job directory"]["found"]
    assert found["torch"]["level"] in ("ok", "warning")
    assert list(nowhere.iterdir()) == []


def test_the_table_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["doctor", "--checkpoints", "/proc/nowhere"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.split()[:2] == ["broken", "checkpoints"])
    assert "/proc: making a directory: " in lines[at]
    assert lines[at + 1].strip().startswith("→ give a directory")


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--checkpoints", "ftp://x"], 78), (["--config", "nope.yaml"], 78), (["--deep"], 64), (["please"], 64)],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> None:
    assert cli.call(["doctor", *words]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_check_that_hangs_or_fails_is_a_finding() -> None:
    gate = threading.Event()

    def hangs() -> Iterator[Finding]:
        gate.wait()
        yield ok("late", "")

    def fails() -> list[Finding]:
        raise StorageError("it is\nbroken")

    try:
        found = doctor.examine({"first": lambda: [ok("first", "well")], "hangs": hangs, "fails": fails}, 0.2)
    finally:
        gate.set()
    assert [(finding.check, finding.level) for finding in found] == [
        ("first", Level.OK), ("hangs", Level.BROKEN), ("fails", Level.BROKEN),
    ]  # fmt: skip
    assert "no answer within" in found[1].found
    assert found[2].found == "it is broken"


def test_a_directory_that_cannot_be_written_is_told_by_what_failed(tmp_path: Path) -> None:
    probe = probes.directory(tmp_path)
    assert probe.failed is None
    assert probe.locks
    assert probe.links
    assert probe.bytes > 0
    assert list(tmp_path.iterdir()) == []
    assert probes.skew(tmp_path) == pytest.approx(0, abs=1)
    failed = probes.directory(Path("/proc"))
    assert failed.failed is not None
    assert failed.failed.startswith("making a directory")
    assert probes.existing(tmp_path / "a" / "b") == tmp_path


@WITH_S3
def test_an_object_store_is_tried(
    capsys: pytest.CaptureFixture[str], url: str, reached: proxies.Proxy
) -> None:
    code, found = call(capsys, "--checkpoints", url)
    assert (
        "put-if-absent is honoured" in found["checkpoints"]["found"]
        or found["checkpoints"]["level"] == "warning"
    )
    reached.set(proxies.Fault("status", status=403))
    code, found = call(capsys, "--checkpoints", url)
    assert (code, found["checkpoints"]["level"]) == (1, "broken")
    assert "403" in found["checkpoints"]["found"]


# --------------------------------------------------------------------------- where nodes meet, and the cloud


def test_where_several_nodes_would_meet(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert call(capsys, "--store", f"tcp://127.0.0.1:{port}")[1]["store"]["level"] == "warning"
    found = call(capsys, "--store", f"tcp://127.0.0.1:{port}")[1]["store"]
    assert (found["level"], found["found"]) == ("ok", f"tcp://127.0.0.1:{port}: this host's, and free")
    code, found_all = call(capsys, "--store", "tcp://no-such-host.invalid:1")
    assert (code, found_all["store"]["level"]) == (1, "broken")
    for what, level in (
        (Door.ANSWERS, Level.OK),
        (Door.SHUT, Level.OK),
        (Door.UNREACHED, Level.BROKEN),
    ):
        assert judgements.door("tcp://h:1", what, "timed out").level is level


def test_within_a_step_on_several_nodes_it_is_slurms_first_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {
        "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_STEP_NUM_TASKS": "2",
    }  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert call(capsys)[1]["store"]["found"].startswith("tcp://localhost:20005")


def test_an_etcd_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with etcds.running() as port:
        found = call(capsys, "--store", f"etcd://127.0.0.1:{port}")[1]["store"]
        assert (found["level"], found["mend"]) == ("ok", None)
        assert f"etcd://127.0.0.1:{port}: healthy" in found["found"]
    code, found_all = call(capsys, "--store", f"etcd://127.0.0.1:{port}")
    assert (code, found_all["store"]["level"]) == (1, "broken")


@pytest.mark.parametrize(
    ("cloud", "emulator"), [("aws", AwsEmulator), ("gcp", GcpEmulator), ("azure", AzureEmulator)]
)
def test_whether_the_cloud_would_be_heard(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nowhere: Path, cloud: str,
    emulator: type[Emulator],
) -> None:  # fmt: skip
    (nowhere / "everstep.yaml").write_text(f"notices: {cloud}\n")
    one = emulator()
    with one.serving():
        monkeypatch.setenv("EVERSTEP_METADATA_URL", one.url)
        found = call(capsys)[1]["notices"]
        assert found["level"] == "ok"
        assert found["found"].lower().startswith(f"{cloud}: the metadata service answers")
        one.faults.extend([403, 403, 403, 403])
        found = call(capsys)[1]["notices"]
        assert found["level"] == "warning"
        assert "403" in found["found"]


# --------------------------------------------------------------------------- clusters

GOOD = {
    "JobRequeue": "1", "KillWait": "30 sec", "PreemptMode": "REQUEUE", "PreemptType": "preempt/partition_prio",
    "ProctrackType": "proctrack/cgroup", "Epilog": "/etc/epilog.sh", "JobContainerType": "job_container/none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "save", "warned"),
    [
        ({}, 5.0, ""),
        ({}, None, ""),
        ({"JobRequeue": "0"}, 5.0, "requeue"),
        ({"KillWait": "5 sec"}, None, "KillWait"),
        ({}, 60.0, "KillWait preemption"),
        ({"PreemptMode": "SUSPEND,GANG"}, 5.0, "preemption"),
        ({"PreemptMode": "OFF"}, 25.0, "KillWait"),
        ({"ProctrackType": "proctrack/pgid"}, 5.0, "ProctrackType"),
        ({"Epilog": "(null)"}, 5.0, "/dev/shm"),
        ({"Epilog": "(null)", "JobContainerType": "job_container/tmpfs"}, 5.0, ""),
    ],
)
def test_settings_of_a_cluster(changes: dict[str, str], save: float | None, warned: str) -> None:
    found = fitness.findings({**GOOD, **changes}, None, grace=60, limit=86400, save=save)
    assert " ".join(f.check.removeprefix("slurm ") for f in found if f.level is not Level.OK) == warned
    assert all((f.mend is None) == (f.level is Level.OK) for f in found)


@pytest.mark.parametrize(
    ("limit", "save", "level"), [(None, 9.0, Level.OK), (3600, 60.0, Level.OK), (600, 120.0, Level.WARNING)]
)
def test_a_time_limit_against_the_measured_save(limit: float | None, save: float, level: Level) -> None:
    assert fitness.time_limit(limit, save).level is level


class Cluster:
    """Answers as ``scontrol show`` does."""

    def __init__(self, job: str) -> None:
        self._job = job

    def show(self, *what: str) -> str | None:
        match what:
            case ("config",):
                return "".join(f"{name:<24}= {value}\n" for name, value in GOOD.items())
            case ("partition",):
                return (
                    "PartitionName=a Default=NO GraceTime=1 MaxTime=00:10:00\n"
                    "PartitionName=b Default=YES GraceTime=90 MaxTime=2-00:00:00\n"
                )
            case ("partition", "a"):
                return "PartitionName=a Default=NO GraceTime=1 MaxTime=00:10:00\n"
            case ("job", "4"):
                return self._job
            case _:
                return None

    def requeue(self, job: int) -> str | None:
        raise AssertionError("a doctor changes nothing")

    def exclude(self, job: int, nodes: Sequence[str]) -> str | None:
        raise AssertionError("a doctor changes nothing")


def test_the_cluster_is_asked_for_this_job_and_its_partition() -> None:
    outside = {f.check: f for f in examining.examine(Cluster(""), {}, 5.0)}
    assert "GraceTime 90 s" in outside["slurm preemption"].found
    assert "2880 min" in outside["slurm time limit"].found
    inside = {
        f.check: f
        for f in examining.examine(Cluster(show(requeue=0)), {**HET, "SLURM_JOB_PARTITION": "a"}, 5.0)
    }
    assert inside["slurm requeue"].found == "this job may not be requeued"
    assert inside["slurm time limit"].found.startswith("5 min")
    assert inside["slurm preemption"].level is Level.WARNING


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:00:00", 93600.0),
        ("00:10:00", 600.0),
        ("UNLIMITED", None),
        ("Partition_Limit", None),
        (None, None),
    ],
)
def test_time_limits_are_read(text: str | None, seconds: float | None) -> None:
    assert shown.limit(text) == seconds
