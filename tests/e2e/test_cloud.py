"""Jobs whose checkpoints lie in an object store: a real server, and a proxy that makes it fail."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from supervisor.model import CheckpointCommitted, CheckpointFailed, Resumed, SnapshotCompleted, State, Tier
from tests.e2e.conftest import STEPS
from tests.e2e.harness import Job, digests, python
from tests.stores.fixtures import WITH_S3
from tests.stores.proxy import Fault, Proxy

pytestmark = WITH_S3

EVERY = ("--snapshot-every", "5steps", "--checkpoint-every", "5steps", "--keep-last", "2")


def kept_listing(job: Job, *words: str) -> Any:
    """``everstep checkpoints … --json``, without a process of its own."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.call(["checkpoints", *words, "--json", "--dir", str(job.folder)]) == 0, said.getvalue()
    return json.loads(said.getvalue())


def test_resume_from_s3_after_memory_is_lost(
    job: Job, tmp_path: Path, alone: dict[str, str], reached: Proxy, url: str
) -> None:
    """The training is killed, then the host's memory is gone: the same weights in the end."""
    out = tmp_path / "out"
    options = (*EVERY, "--checkpoints", url)
    faults: list[dict[str, object]] = [
        {"attempt": 0, "rank": 0, "step": 13, "kind": "SIGKILL"},
        {"attempt": 1, "rank": 0, "step": 17, "kind": "SIGKILL", "target": "supervisor"},
    ]
    assert job.run(python("--out", out), *options, faults=faults) == -9
    job.until_no_processes()
    durable = max(fact.step for fact in job.facts(CheckpointCommitted))
    shutil.rmtree(job.runtime)
    assert job.run(python("--out", out), *options, faults=faults) == 0, job.output
    assert digests(out) == alone
    resumes = job.facts(Resumed)
    assert [fact.tier for fact in resumes] == [None, Tier.RAM, Tier.CHECKPOINT]
    assert resumes[-1].step >= durable
    assert resumes[-1].path == f"{url}/step-{resumes[-1].step:09d}"
    assert not job.runtime.exists()
    assert not (job.folder / "staging").exists()
    assert not (job.folder / "checkpoints").exists()
    listed = kept_listing(job, "list")
    assert len(listed) == 2  # retention works there too
    assert listed[0]["step"] == STEPS
    older = listed[1]["step"]  # STEPS - 5, unless its turn came too late: the newest snapshot wins
    assert listed[0]["path"] == f"{url}/step-{STEPS:09d}"
    assert all(entry["problem"] is None for entry in kept_listing(job, "verify"))
    newest = f"{url}/step-{STEPS:09d}"
    assert kept_listing(job, "verify", newest, "latest") == kept_listing(job, "verify", str(STEPS)) * 2
    seen = kept_listing(job, "inspect", "latest")
    assert (seen["path"], seen["verified"]) == (newest, "everything")
    done = kept_listing(job, "export", newest, "--weights-only", "-o", str(tmp_path / "w.safetensors"))
    assert (done["path"], done["step"]) == (newest, STEPS)
    changed = kept_listing(job, "compare", str(older), "latest", "--weights-only")
    assert {entry["kind"] for entry in changed["items"]} == {"changed"}
    assert [entry["step"] for entry in kept_listing(job, "prune", "--keep-last", "1")] == [older]
    assert [entry["step"] for entry in kept_listing(job, "list")] == [STEPS]
    status = job.status()
    assert status["checkpoint_failure"] is None


def test_an_outage_does_not_stop_the_training(
    job: Job, tmp_path: Path, alone: dict[str, str], reached: Proxy, url: str
) -> None:
    """The store answers 503 for a while: that is said, and once it is back the drains go on by themselves."""
    out, go = tmp_path / "out", tmp_path / "go"
    options = (*EVERY, "--checkpoints", url, "--storage-timeout", "1s")
    slow = ("--pause", "0.3", "--pause-until", go)
    job.start(python("--out", out, *slow), *options)
    job.until_fact(CheckpointCommitted)
    reached.set(Fault("status", status=503))
    failed = job.until_fact(CheckpointFailed)
    assert "503" in failed.reason
    assert "503" in str(job.status()["checkpoint_failure"])
    step = failed.step
    job.until_fact(SnapshotCompleted, lambda fact: fact.step > step)  # training goes on
    reached.set(None)
    job.until_fact(CheckpointCommitted, lambda fact: fact.step > step)
    go.touch()
    assert job.wait() == 0, job.output
    assert digests(out) == alone
    assert job.status()["checkpoint_failure"] is None


def test_an_outage_of_more_than_a_minute_with_the_timeouts_that_users_have(
    job: Job, tmp_path: Path, alone: dict[str, str], reached: Proxy, url: str
) -> None:
    """The store hangs, longer than a request may take, and then answers 503."""
    out, go = tmp_path / "out", tmp_path / "go"
    options = (
        "--snapshot-every",
        "2steps",
        "--checkpoint-every",
        "2steps",
        "--keep-last",
        "2",
        "--checkpoints",
        url,
    )
    job.start(python("--out", out, "--pause", "3.5", "--pause-until", go), *options)
    job.until_fact(CheckpointCommitted, deadline=60)
    begun = time.monotonic()
    for fault in (Fault("hang"), Fault("status", status=503)):
        reached.set(fault)
        ends = time.monotonic() + 35
        step = max(fact.step for fact in job.facts(SnapshotCompleted))
        job.until_fact(SnapshotCompleted, lambda fact, step=step: fact.step > step, deadline=35)
        job.until(lambda ends=ends: time.monotonic() > ends or None)
    reached.set(None)
    assert time.monotonic() - begun > 70
    step = max(fact.step for fact in job.facts(CheckpointCommitted))
    job.until_fact(CheckpointCommitted, lambda fact: fact.step > step, deadline=60)
    go.touch()
    assert job.wait() == 0, job.output
    assert digests(out) == alone
    assert [fact.attempt for fact in job.facts(Resumed)] == [0], "the training has not noticed"
    listed = kept_listing(job, "verify")
    assert listed[0]["step"] == STEPS
    assert all(entry["problem"] is None for entry in listed)


@pytest.mark.parametrize("kind", ["hang", "status"])
def test_preempted_while_the_store_is_gone(
    job: Job, tmp_path: Path, alone: dict[str, str], reached: Proxy, url: str, kind: str
) -> None:
    """The state goes into the job directory within the grace, and a run elsewhere goes on from it."""
    out, go = tmp_path / "out", tmp_path / "go"
    options = (*EVERY, "--checkpoints", url, "--storage-timeout", "20s", "--grace", "8s")
    job.start(python("--out", out, "--pause", "0.2", "--pause-until", go), *options)
    job.until_fact(CheckpointCommitted)
    reached.set(Fault(kind))
    job.until_fact(SnapshotCompleted, lambda fact: fact.step > 5)
    started = time.monotonic()
    job.signal(signal.SIGTERM)
    assert job.wait(30) == 75, job.output
    assert time.monotonic() - started < 10
    copy = job.facts(CheckpointCommitted)[-1]
    assert copy.emergency
    assert copy.path.startswith(str(job.folder / "checkpoints"))
    assert f"{url} did not take step {copy.step}" in job.output
    assert job.record.state is State.PREEMPTED
    assert not job.runtime.exists()  # it is durable: nothing stays in memory
    reached.set(None)
    go.touch()
    assert job.run(python("--out", out), *options) == 0, job.output
    last = job.facts(Resumed)[-1]
    assert (last.step, last.tier, last.path) == (copy.step, Tier.CHECKPOINT, copy.path)
    assert digests(out) == alone
    assert kept_listing(job, "list")[0]["step"] == STEPS


def test_finished_while_the_store_is_gone(
    job: Job, tmp_path: Path, alone: dict[str, str], reached: Proxy, url: str
) -> None:
    """The last checkpoint is an emergency copy, until a later command finds the store again."""
    out, go = tmp_path / "out", tmp_path / "go"
    options = (*EVERY, "--checkpoints", url, "--storage-timeout", "1s")
    job.start(python("--out", out, "--pause", "0.2", "--pause-until", go), *options)
    job.until_fact(CheckpointCommitted)
    reached.set(Fault("status", status=503))
    go.touch()
    assert job.wait() == 0, job.output
    copy = job.facts(CheckpointCommitted)[-1]
    assert (copy.step, copy.emergency) == (STEPS, True)
    assert digests(out) == alone
    command = python("--out", out)
    assert job.run(command, *options) == 0, job.output
    assert f"the emergency copy in {copy.path} could not be stored elsewhere" in job.output
    reached.set(None)
    assert job.run(command, *options) == 0, job.output
    assert f"the emergency copy of step {STEPS} is in {url} now" in job.output
    assert f"is finished (step {STEPS})" in job.output
    newest = kept_listing(job, "verify", "latest")[0]
    assert (newest["path"], newest["problem"]) == (f"{url}/step-{STEPS:09d}", None)
    assert job.run(command, *options) == 0, job.output
    assert job.output.count("the emergency copy of step") == 1, "once is enough"
    assert job.record.state is State.COMPLETED


def test_a_hung_store_does_not_hold_up_the_next_attempt(
    job: Job, tmp_path: Path, alone: dict[str, str], reached: Proxy, url: str
) -> None:
    out = tmp_path / "out"
    options = (*EVERY, "--checkpoints", url, "--storage-timeout", "60s", "--grace", "4s")
    faults: list[dict[str, object]] = [{"attempt": 0, "rank": 0, "step": 23, "kind": "SIGKILL"}]
    job.start(python("--out", out, "--pause", "0.1"), *options, faults=faults)
    job.until_fact(CheckpointCommitted)
    reached.set(Fault("hang"))
    # sooner than what it asked of the store could have failed, on a slow machine too
    resumed = job.until_fact(Resumed, lambda fact: fact.attempt == 1, deadline=55)
    assert resumed.tier is Tier.RAM
    reached.set(None)
    assert job.wait() == 0, job.output
    assert digests(out) == alone


def test_a_damaged_checkpoint_in_s3_is_skipped(
    job: Job, tmp_path: Path, alone: dict[str, str], reached: Proxy, url: str
) -> None:
    import obstore

    from supervisor.checkpoint.bucket import Limits, connect
    from supervisor.checkpoint.location import Remote

    out = tmp_path / "out"
    options = (*EVERY, "--checkpoints", url)
    faults: list[dict[str, object]] = [
        {"attempt": 0, "rank": 0, "step": 22, "kind": "SIGKILL", "target": "supervisor"}
    ]
    slow = ("--pause", "0.1", "--pause-until", tmp_path / "go")
    assert job.run(python("--out", out, *slow), *options, faults=faults) == -9
    job.until_no_processes()
    shutil.rmtree(job.runtime)
    store = connect(Remote(url), Limits(timeout=10))
    paths = sorted(entry["path"] for entry in obstore.list(store).collect())
    # not every fifth step: one drain is under way at a time, and the newest snapshot is the next
    *_, before, newest = [path.partition("/")[0] for path in paths if path.endswith("/everstep.json")]
    file = f"{newest}/__0_0.distcp"
    data = bytearray(bytes(obstore.get(store, file).bytes()))
    data[len(data) // 2] ^= 1
    obstore.put(store, file, bytes(data))
    (tmp_path / "go").touch()
    assert job.run(python("--out", out), *options, faults=faults) == 0, job.output
    assert job.facts(Resumed)[-1].step == int(before.removeprefix("step-"))
    assert "digest does not match; skipping it" in job.output
    assert digests(out) == alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "403 Forbidden"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be used"),
        ({"AWS_ACCESS_KEY_ID": "readerkey"}, "403 Forbidden"),
    ],
    ids=["secret", "endpoint", "read only"],
)
def test_a_store_that_cannot_be_used_is_one_line_at_the_start(
    job: Job,
    tmp_path: Path,
    reached: Proxy,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    said: str,
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    code = job.run(python("--out", tmp_path), "--checkpoints", url, "--storage-timeout", "2s", deadline=20)
    assert code == 78, job.output
    assert len(job.output.strip().splitlines()) == 1, job.output
    assert url in job.output
    assert said in job.output


def test_a_bucket_that_is_not_there(job: Job, tmp_path: Path, reached: Proxy) -> None:
    code = job.run(python("--out", tmp_path), "--checkpoints", "s3://nosuch/x", deadline=20)
    assert code == 78, job.output
    assert len(job.output.strip().splitlines()) == 1, job.output
