"""One job on several hosts: what fails, is cut off, comes back and is asked to leave, and the weights of an undisturbed run in the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.notices.metadata import ENVIRONMENT
from supervisor.model import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    Effect,
    FailureKind,
    FirstStep,
    NoticeReceived,
    NoticeWithdrawn,
    Resumed,
    SnapshotCompleted,
    Tier,
    WorkersReady,
)
from tests.e2e.conftest import STEPS
from tests.e2e.harness import DEADLINE, ROOT, digests
from tests.hosts.lab import WHY_NOT, Lab
from tests.hosts.nodes import Nodes
from tests.notices.emulators import Answer, Asked, AzureEmulator
from tests.store import etcd
from tests.stores import seaweed

pytestmark = [pytest.mark.xdist_group("hosts"), pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

OPTIONS = ("--snapshot-every", "1step", "--checkpoint-every", "5steps", "--lease", "3s")
ALONE = ("--standby", "off")  # launching one on each host, time and again, takes longer than all else


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(2) as one:
        yield one


def test_two_hosts_fail_stop_and_lose_the_one_that_leads(
    lab: Lab, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    one, other = lab.hosts
    job = Nodes(lab, tmp_path / "job")
    out = tmp_path / "out"
    arguments = ("--out", out, "--hold", 6, 25, "--pause", 0.2, "--pause-until", tmp_path / "go-25")
    options = ("--nnodes", 2, "--node-timeout", "15s", *OPTIONS)
    faults = [{"attempt": 1, "rank": 0, "step": 18, "kind": "raise"}]
    job.begin_all(*arguments, options=options, faults=faults)

    # seen from a host that does not lead, and from the one that does
    assert job.until_at(6, 0, 1) == 0
    job.until_standby(one, other)
    for host in (other, one):
        shown = job.until(lambda host=host: all_seen(job.status_on(host)))
        assert (shown["step"], shown["nodes"]) == (6, ["h1", "h2"])
    assert shown["live"]["from"] == "control pages"

    # a rank is killed on one host while the standby waits, then one raises on the other
    elsewhere = one.popen(
        [*job.command("rehearse", "--yes", "kill-rank", "--rank", 1)], stderr=subprocess.PIPE, cwd=ROOT
    )
    refused = elsewhere.communicate(timeout=DEADLINE)[1].decode()
    assert elsewhere.returncode == 64
    assert "rank 1 is not on h1, which has 0" in refused
    with open(tmp_path / "rehearsal", "wb") as sink:
        rehearsal = other.popen(
            job.command("rehearse", "--yes", "--json", "kill-rank"), stdout=sink, cwd=ROOT
        )
    job.until_fact(AttemptStarted, lambda fact: fact.attempt == 1)
    job.let_go(6)
    assert rehearsal.wait(DEADLINE) == 0
    report = json.loads((tmp_path / "rehearsal").read_text())
    assert (report["rank"], report["failure"], report["standby"], report["recovered"]) == (
        1,
        "crash",
        True,
        True,
    )
    job.until_fact(FirstStep, lambda fact: fact.attempt == 2)
    assert [fact.standby for fact in job.facts(AttemptStarted)] == [False, True, False], job.output
    assert [fact.failure.kind for fact in job.facts(AttemptEnded) if fact.failure] == [
        FailureKind.CRASH,
        FailureKind.EXCEPTION,
    ]
    assert "on h2" in job.output
    for resumed in job.facts(Resumed)[1:]:
        assert resumed.tier is Tier.RAM
        assert resumed.step == newest_before(job, resumed)

    # one host is asked to leave: one agreed save, and the same command carries on
    job.runs[other.name].send_signal(signal.SIGTERM)
    assert job.codes(one, other) == [75, 75], job.output
    saved = job.record.checkpoint
    assert saved is not None
    assert [job.left_on(host) for host in (one, other)] == [[], []]
    assert not out.exists()
    options = (*options, *ALONE)
    job.begin_all(*arguments, options=options)
    assert job.until_at(25, 0, 1) == 3
    assert job.facts(Resumed)[-1].step == saved.step

    # the one that leads loses its power: the other keeps what it has, and with that they carry on
    one.crash()
    assert job.codes(other) == [75], job.output
    assert job.left_on(other)
    one.boot()
    job.let_go(25)
    job.begin_all(*arguments, options=options)
    assert job.codes(one, other) == [0, 0], job.output
    assert job.facts(Resumed)[-1].tier is Tier.RAM
    assert job.facts(Resumed)[-1].step >= 23, "h2 has had a copy of what h1 stored"
    assert digests(out) == undisturbed
    job.begin_all(*arguments, options=options)
    assert job.codes(one, other) == [0, 0], job.output
    for host in (one, other):
        assert f"is finished (step {STEPS})" in job.output_of(host).read_text()
    assert [job.left_on(host) for host in (one, other)] == [[], []]


def test_with_etcd_the_store_goes_away_the_leader_is_cut_off_and_the_next_one_crashes(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    with Lab(4) as lab, contextlib.ExitStack() as stack:
        one, other, spare, store = lab.hosts
        port, data = etcd.free_port(), tmp_path / "etcd"
        inside = ("nsenter", f"--target={store.first}", "--net", "--")
        bucket = stack.enter_context(seaweed.running(store.address, inside))
        job = Nodes(lab, tmp_path / "job", f"etcd://{store.address}:{port}", bucket.environment())
        out = tmp_path / "out"
        arguments = ("--out", out, "--hold", 5, 10, 16, 18, 22, 26, "--pause", 0.1)
        options = ("--nnodes", 2, "--node-timeout", "60s", "--checkpoints", "s3://ckpt/run", *OPTIONS, *ALONE)
        with etcd.running(store.address, inside, port, data):
            job.begin(one, *arguments, options=options)
            job.until_said(one, "job started")
            job.begin(other, *arguments, options=options)
            assert job.until_at(5, 0, 1) == 0
            job.begin(spare, *arguments, options=options)
            job.until_said(spare, "follows h1")
            double = job.begin(store, *arguments, options=(*options, "--node-name", spare.name))
            job.until_said(store, "a node called h3 is part of the job already")
            double.send_signal(signal.SIGTERM)
            assert job.codes(store) == [75]

        # nobody reaches the store: the ranks go on
        for host in (one, other):
            job.until_said(host, "the store is not reached")
        job.let_go(5)
        assert job.until_at(10, 0, 1) == 0
        with etcd.running(store.address, inside, port, data):
            for host in (one, other):
                job.until_said(host, "the store is reached again")
            lab.rate(one, 2)  # megabits a second: all takes its time, and nobody is taken for lost
            job.let_go(10)
            assert job.until_at(16, 0, 1) == 0
            job.until_offered(one, attempt=0)
            job.let_go(16)
            assert job.until_at(18, 0, 1) == 0
            job.until_copied(other, 6)
            lab.rate(one, None)

            # the leader is cut off: another one leads, the spare takes its place; healed, it is the spare
            lab.cut(one)
            assert job.until_at(18, 0, 1, after=0) == 1
            assert job.facts(Resumed)[-1].tier is Tier.RAM, "h2 has had a copy of what h1 stored"
            lab.heal(one)
            leader, rest = (
                (other, spare) if "job resumed" in job.output_of(other).read_text() else (spare, other)
            )
            job.until_said(one, f"follows {leader}")
            job.let_go(18)
            assert job.until_at(22, 0, 1) == 1

            # the leader is asked to leave: from what all have saved the others go on, under another one, which crashes
            job.runs[leader.name].send_signal(signal.SIGTERM)
            job.until_said(leader, f"to go on without {leader} (SIGTERM on {leader})")
            job.let_go(22)
            assert job.codes(leader) == [75], job.output
            assert job.left_on(leader) == []
            assert job.until_at(26, 0, 1) == 2
            assert job.facts(Resumed)[-1].step == newest_before(job, job.facts(Resumed)[-1])
            first = one if "job resumed" in job.output_of(one).read_text() else rest
            before = job.output_of(leader).read_text().count(f"follows {first}")
            job.begin(leader, *arguments, options=options)
            job.until_said(leader, f"follows {first}", before + 1)
            first.crash()
            job.let_go(26)
            rest = rest if first is one else one
            assert job.codes(leader, rest) == [0, 0], job.output
        assert digests(out) == undisturbed
        assert [fact.attempt for fact in job.facts(AttemptStarted)] == [0, 1, 2, 3]
        assert job.record.epoch == 4
        assert [job.left_on(host) for host in (leader, rest)] == [[], []]
        # each node has put its own files into the store, and none of them into the job directory
        words = ("checkpoints", "list", "--verify", "--json", "--dir", job.folder)
        environ = {**os.environ, **bucket.environment()}
        kept = json.loads(store.run(sys.executable, "-m", "launch.cli", *words, cwd=ROOT, env=environ))
        committed = {
            fact.step for fact in job.facts(CheckpointCommitted)
        }  # the newest wins: not each that was due
        assert all(one["verified"] for one in kept)
        assert {one["step"] for one in kept} <= committed
        assert kept[0]["step"] == STEPS
        assert len(kept) in (2, 3)
        assert not list(job.folder.rglob("*.distcp"))


def test_all_memory_is_lost_and_one_host_finds_that_the_newest_checkpoint_is_damaged(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    with Lab(3) as lab:
        one, other, store = lab.hosts
        inside = ("nsenter", f"--target={store.first}", "--net", "--")
        with seaweed.running(store.address, inside) as bucket:
            job = Nodes(lab, tmp_path / "job", environ=bucket.environment())
            out = tmp_path / "out"
            arguments = ("--out", out, "--hold", 22, "--pause", 0.1)
            options = ("--nnodes", 2, "--checkpoints", "s3://ckpt/run", *OPTIONS, *ALONE)
            for host in (one, other):
                job.begin(host, *arguments, options=options)
            assert job.until_at(22, 0, 1) == 0
            before, newest = job.until(lambda: two_newest(job.facts(CheckpointCommitted)))
            for host in (one, other):
                host.crash()
            for host in (one, other):
                host.boot()

            # rank 1 reads what is damaged, and nobody else
            environ = {**os.environ, **bucket.environment()}
            store.run(sys.executable, "-c", DAMAGE, f"step-{newest:09d}", cwd=ROOT, env=environ)
            job.let_go(22)
            for host in (one, other):
                job.begin(host, *arguments, options=options)
            assert job.codes(one, other) == [0, 0], job.output
    resumed = job.facts(Resumed)[1:]
    assert [(fact.step, fact.tier) for fact in resumed] == [
        (newest, Tier.CHECKPOINT),
        (before, Tier.CHECKPOINT),
    ]
    assert "rank 1 cannot load s3://ckpt/run/step-" in job.output_of(other).read_text()
    assert "__1_0.distcp: digest does not match; skipping it" in job.output_of(one).read_text()
    for host in (one, other):
        read = re.findall(r"(\S+ \S+) of the checkpoint's", job.output_of(host).read_text())
        assert len(read) == 1, "nobody has gone on from the damaged one"
    assert digests(out) == undisturbed


def two_newest(facts: list[CheckpointCommitted]) -> tuple[int, int] | None:
    return (facts[-2].step, facts[-1].step) if len(facts) > 1 else None


#: flip a bit in the middle of what rank 1 has stored
DAMAGE = """
import sys
import obstore
from supervisor.checkpoint.bucket import Limits, connect
from supervisor.checkpoint.location import Remote
store = connect(Remote("s3://ckpt/run"), Limits(timeout=10))
paths = [entry["path"] for entry in obstore.list(store).collect()]
(path,) = [path for path in paths if sys.argv[1] in path and path.endswith("__1_0.distcp")]
data = bytearray(obstore.get(store, path).bytes())
data[len(data) // 2] ^= 1
obstore.put(store, path, bytes(data))
"""


def test_a_job_of_two_to_three_hosts_shrinks_and_grows_and_strangers_stay_out(tmp_path: Path) -> None:
    with Lab(4) as lab, contextlib.ExitStack() as stack:
        one, other, third, stranger = lab.hosts
        job = Nodes(lab, tmp_path / "job")
        durable: list[int | None] = []  # when the cloud may have the machine

        class Cloud(AzureEmulator):
            async def answer(self, asked: Asked) -> Answer:
                if asked.method == "POST":
                    durable.append(job.record.checkpoint and job.record.checkpoint.step)
                return await super().answer(asked)

        cloud = Cloud()
        stack.enter_context(cloud.serving(other.first))
        out = tmp_path / "out"
        arguments = ("--out", out, "--hold", 5, 8, 20, 25, "--pause", 0.1)
        options = ("--nnodes", "2:3", "--node-timeout", "60s", *OPTIONS, *ALONE)
        for host in (one, third):
            job.begin(host, *arguments, options=options)
        job.begin(
            other, *arguments, options=(*options, "--notices", "azure"), environ={ENVIRONMENT: cloud.url}
        )
        assert job.until_at(5, 0, 1, 2) == 0
        elsewhere = Nodes(lab, tmp_path / "elsewhere" / "job")
        elsewhere.begin(
            stranger, *arguments, options=("--nnodes", "2:3", "--node-timeout", "5s"), key="another"
        )
        assert elsewhere.codes(stranger) == [75], elsewhere.output
        assert "another EVERSTEP_KEY" in elsewhere.output
        third.crash()
        job.let_go(5)
        assert job.until_at(8, 0, 1, after=0) == 1
        lost = [fact.failure for fact in job.facts(AttemptEnded) if fact.failure]
        assert [failure.kind for failure in lost] == [FailureKind.NODE_LOST]
        assert "h3" in lost[0].reason

        # it comes back, and fails first again and again: it is left out, as long as there are enough without it
        third.boot()
        faults: list[dict[str, object]] = [
            {"attempt": attempt, "rank": 2, "step": None, "kind": "SIGKILL"} for attempt in (2, 3)
        ]
        job.begin(third, *arguments, options=options, faults=faults)
        job.until_said(one, "to go on with h3")
        job.let_go(8)
        job.until_said(one, "node h3 is left out for 10 minutes: it failed first 2 times in a row")
        assert job.until_at(20, 0, 1, after=3) == 4

        # a cloud takes a machine of one that follows, thinks better of it, and takes it
        cloud.schedule("Reboot", 7200, event="reboot")
        job.until_fact(NoticeReceived, lambda fact: fact.node == "h2" and fact.effect is Effect.LEAVE)
        cloud.events = []
        job.until_fact(NoticeWithdrawn, lambda fact: fact.source == "Azure Reboot on h2")
        cloud.schedule("Preempt", 300)
        job.until_said(one, "to go on without h2 (Azure Preempt on h2)")
        job.let_go(20)
        assert job.codes(other) == [75], job.output
        assert "acknowledged: the machine may go" in job.output_of(other).read_text()
        assert job.until_at(25, 0, 1, after=4) == 5
        assert durable == [job.facts(Resumed)[-1].step]
        assert cloud.started == [cloud.events[0]["EventId"]]

        job.runs[third.name].send_signal(signal.SIGINT)
        job.until_said(one, "SIGINT on h3: all ranks save the same step and stop")
        job.let_go(25)
        assert job.codes(one, third) == [130, 130], job.output
        assert [fact.world_size for fact in job.facts(WorkersReady)] == [3, 2, 3, 3, 2, 2]
        for resumed in job.facts(Resumed)[1:]:
            assert resumed.step == newest_before(job, resumed)
        assert job.record.checkpoint is not None
        assert job.record.checkpoint.step >= 25
        assert [job.left_on(host) for host in (one, other, third)] == [[], [], []]


def test_two_of_three_hosts_do_not_reach_each_other_any_more(tmp_path: Path) -> None:
    """Both reach the store, and the one that leads: it finds out which two, and goes on with one of them."""
    with Lab(3) as lab:
        one, other, third = lab.hosts
        job = Nodes(lab, tmp_path / "job")
        out, gone_on = tmp_path / "out", tmp_path / "gone-on"
        arguments = ("--out", out, "--steps", 300, "--pause", 0.2, "--pause-until", gone_on)
        job.begin_all(*arguments, options=("--nnodes", "2:3", "--hang", "4s", *OPTIONS, *ALONE))
        job.until_fact(SnapshotCompleted, lambda fact: fact.step > 2)
        for host in lab.hosts:
            job.until_copied(host, 2)
        lab.cut_pair(other, third)
        job.until_said(one, "node h3 is left out for 10 minutes: h2 and h3 do not reach each other")
        job.until_fact(FirstStep, lambda fact: fact.attempt == 1)
        gone_on.touch()
        assert job.codes(one, other, third) == [0, 0, 0], job.output
        failures = [fact.failure for fact in job.facts(AttemptEnded) if fact.failure]
        assert [failure.kind for failure in failures] == [FailureKind.NODE_LOST], job.output
        assert "though they reach the store" in failures[0].reason
        resumed = job.facts(Resumed)[-1]
        assert (resumed.tier, resumed.step) == (Tier.RAM, newest_before(job, resumed))
        assert [fact.world_size for fact in job.facts(WorkersReady)] == [3, 2]
        assert [job.left_on(host) for host in lab.hosts] == [[], [], []]


def all_seen(shown: dict[str, Any]) -> dict[str, Any] | None:
    """The status, once the own time of both ranks is known."""
    return shown if len(shown["own_shares"]) == 2 and None not in shown["own_shares"] else None


def newest_before(job: Nodes, resumed: Resumed) -> int:
    """The newest step that was whole everywhere when that attempt began."""
    return max(fact.step for fact in job.facts(SnapshotCompleted) if fact.attempt < resumed.attempt)
