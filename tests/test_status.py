from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import status
from supervisor.decide import lifecycle
from supervisor.edge import journal, live_file
from supervisor.edge.control import ControlPage, Word
from supervisor.edge.journal import decode, encode
from supervisor.edge.live import Live, is_held
from supervisor.edge.live_file import Told
from supervisor.errors import JobError
from supervisor.model import (
    Action,
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    DeadlineSet,
    Decided,
    Fact,
    Failure,
    FailureKind,
    FirstStep,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
    Skip,
    SnapshotCompleted,
    State,
    WarningCleared,
    WarningKind,
    WarningRaised,
    WorkersReady,
)
from supervisor.record import JobRecord
from supervisor.status_views import to_json, to_text
from supervisor.wording import duration
from tests.journals import journals

CRASH = Failure(
    kind=FailureKind.CRASH, reason="rank 1 was killed by SIGKILL (after step 90)", attempt=0, time=1100.0, rank=1, step=90, signal=9
)  # fmt: skip


def running() -> list[Fact]:
    """A job that crashed once at step 90, resumed at 80, and is at step 100."""
    return [
        RunStarted(
            time=1000.0,
            epoch=1,
            host=socket.gethostname(),
            pid=4711,
            command=("torchrun", "train.py"),
            version="0.1",
            max_failures=5,
            max_preemptions=100,
        ),
        AttemptStarted(time=1000.0, attempt=0),
        Resumed(time=1000.0, attempt=0, step=0),
        WorkersReady(time=1005.0, attempt=0, world_size=2),
        FirstStep(time=1010.0, attempt=0, step=1, total_steps=200),
        SnapshotCompleted(time=1080.0, attempt=0, step=80, seconds=0.01, bytes=1000),
        Progress(time=1090.0, attempt=0, step=90, total_steps=200, metrics={"loss": 2.5}),
        AttemptEnded(time=1100.0, attempt=0, step=90, failure=CRASH),
        Decided(time=1100.0, attempt=0, action=Action.RESTART, reason="restarting now"),
        AttemptStarted(time=1100.0, attempt=1),
        Resumed(time=1100.0, attempt=1, step=80, tier=None),
        WorkersReady(time=1101.0, attempt=1, world_size=2),
        FirstStep(time=1101.0, attempt=1, step=81, total_steps=200),
        CheckpointCommitted(time=1110.0, attempt=1, step=80, path="checkpoints/step-000000080", seconds=5, bytes=1000),
        Progress(time=1121.0, attempt=1, step=100, total_steps=200, metrics={"loss": 2.0}),
    ]  # fmt: skip


def finished() -> list[Fact]:
    return [
        *running(),
        AttemptEnded(time=1221.0, attempt=1, step=200, finished=True),
        Decided(time=1221.0, attempt=1, action=Action.COMPLETE, reason="finished after all 200 steps"),
        RunEnded(time=1221.0, exit_code=0, reason="finished after all 200 steps"),
    ]


class Job:
    """A job directory and its runtime directory, as a supervisor leaves them."""

    def __init__(self, root: Path) -> None:
        self.path, self.runtime = root / "job", root / "runtime"
        (self.path / "journal").mkdir(parents=True)
        (self.runtime / "control" / "1").mkdir(parents=True)
        (self.path / "lock").touch()
        described = {
            "run_id": "abc",
            "runtime": str(self.runtime),
            "epoch": 1,
            "identity": "train.py",
            "command": ["torchrun", "train.py"],
            "created": 1000.0,
            "format": 1,
        }
        (self.path / "job.json").write_text(json.dumps(described))

    def journal(self, facts: list[Fact]) -> None:
        (self.path / "journal" / "node.jsonl").write_bytes(b"".join(map(encode, facts)))

    def page(self, rank: int, **words: int) -> ControlPage:
        page = ControlPage(self.runtime / "control" / "1" / f"rank-{rank}", create=True)
        for name, value in words.items():
            page[Word[name]] = value
        return page

    def read(self, now: float = 1130.0) -> dict[str, Any]:
        plain = to_json(status.read_status(self.path, now))
        again: dict[str, Any] = json.loads(json.dumps(plain, allow_nan=False))
        return again


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def held(job: Job) -> Iterator[Job]:
    """The job while a supervisor holds it."""
    with open(job.path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield job


def test_a_finished_job(job: Job) -> None:
    job.journal(finished())
    shown = job.read(now=5000.0)
    wanted = {
        "state": "completed",
        "reason": "finished after all 200 steps",
        "attempt": 1,
        "step": 200,
        "total_steps": 200,
        "restarts": 1,
        "lost_steps": 10,
        "snapshot": None,
        "checkpoint": {"step": 80, "age_s": 3890.0},
        "exit_code": 0,
        "command": ["torchrun", "train.py"],
        "run_id": "abc",
        "problems": [],
    }
    assert {key: shown[key] for key in wanted} == wanted
    assert shown["last_failure"] == {
        "kind": "crash",
        "rank": 1,
        "reason": CRASH.reason,
        "attempt": 0,
        "time": 1100.0,
    }
    assert shown["goodput"] == pytest.approx((80 * 80 / 90 + 120) / 221, abs=0.01)
    assert shown["supervisor"] == {"alive": False, "host": socket.gethostname(), "pid": 4711, "epoch": 1}


def test_a_live_job_shows_what_its_slowest_rank_has_done(held: Job) -> None:
    held.journal(running())
    held.page(0, STEP=125, TOTAL_STEPS=200, SAVED_STEP=121).loss = 1.5
    held.page(1, STEP=124, TOTAL_STEPS=200, SAVED_STEP=120)
    shown = held.read(now=1131.0)
    assert (shown["state"], shown["step"], shown["supervisor"]["alive"]) == ("running", 124, True)
    assert shown["snapshot"] == {"step": 119, "age_s": None}  # the page does not say when
    assert "snapshot      step 119\n" in to_text(status.read_status(held.path, 1131.0))
    assert shown["metrics"] == {"loss": 1.5}
    assert shown["rate"] > 0
    assert 0 < shown["goodput"] < 1


def test_the_memory_of_its_snapshots_is_shown(held: Job) -> None:
    held.journal(running())
    held.page(0, STEP=125)
    assert held.read()["memory"] is None
    for slot, length in ((0, 3_000_000), (1, 3_000_000), (2, 0)):
        folder = held.runtime / "slots" / str(slot)
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(bytes(length))
    shown = held.read()["memory"]
    assert (shown["slots"], shown["slot"], shown["needed"]) == (3, 3_000_000, 9_000_000)
    assert shown["free"] > 0
    text = to_text(status.read_status(held.path, 1131.0))
    assert "memory        3 snapshots of 3 MB: 9 MB, " in text


def test_a_snapshot_ahead_of_the_journal_has_the_age_that_its_last_rank_says(held: Job) -> None:
    held.journal(running())
    now = time.time()
    ago = [time.monotonic_ns() - seconds * 10**9 for seconds in (3, 2)]
    for rank in (0, 1):
        held.page(rank, STEP=125, TOTAL_STEPS=200, SAVED_STEP=120, SAVED_NS=ago[rank])
    snapshot = held.read(now=now)["snapshot"]
    assert snapshot["step"] == 119
    assert 1.5 < snapshot["age_s"] < 60  # the clocks of this very test


def test_a_snapshot_that_the_journal_knows_has_its_age(held: Job) -> None:
    told = SnapshotCompleted(time=1125.0, attempt=1, step=119, seconds=0.01, bytes=1000)
    held.journal([*running(), told])
    held.page(0, STEP=125, SAVED_STEP=120)
    assert held.read(now=1131.0)["snapshot"] == {"step": 119, "age_s": 6.0}


def test_a_watch_reads_only_what_is_new(held: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    held.journal(running())
    lines: list[bytes] = []

    def counted(line: bytes) -> Fact | None:
        lines.append(line)
        return decode(line)

    monkeypatch.setattr(journal, "decode", counted)
    watch = status.Watch(held.path)
    assert watch.look(1131.0).step == 100
    assert len(lines) == len(running())
    news = encode(Progress(time=1131.0, attempt=1, step=110, total_steps=200))
    with open(held.path / "journal" / "node.jsonl", "ab") as file:
        file.write(news)
    assert watch.look(1132.0).step == 110
    assert watch.look(1133.0).step == 110
    assert lines[len(running()) :] == [news]


def test_the_pages_of_a_dead_attempt_are_not_believed(held: Job) -> None:
    held.journal(running()[:11])
    held.page(0, STEP=170, SAVED_STEP=171)
    shown = held.read()
    assert (shown["state"], shown["step"], shown["snapshot"]) == ("restarting", 80, None)


def test_pages_that_cannot_be_read_are_no_error(held: Job) -> None:
    held.journal(running())
    (held.runtime / "control" / "1" / "rank-0").write_bytes(b"")
    assert held.read()["step"] == 100


def test_a_supervisor_on_another_host_is_believed_by_its_journal(held: Job) -> None:
    first = running()[0]
    assert isinstance(first, RunStarted)
    held.journal([replace(first, host="elsewhere"), *running()[1:]])
    held.page(0, STEP=170)
    shown = held.read()
    assert (shown["state"], shown["step"]) == ("running", 100)


def elsewhere() -> list[Fact]:
    first, *others = running()
    assert isinstance(first, RunStarted)
    return [replace(first, host="elsewhere"), *others]


def told(**changes: Any) -> Told:
    known = {
        "format": 1,
        "run_id": "abc",
        "epoch": 1,
        "attempt": 1,
        "written": 1121.0,
        "step": 124,
        "world_size": 2,
    }
    return Told(**{**known, "own_shares": (30, 90), "nodes": ("h1", "h2"), **changes})


def test_from_another_host_it_is_seen_by_the_live_file(held: Job) -> None:
    held.journal(elsewhere())
    live_file.write(held.path, told(loss=1.5, total_steps=200))
    os.utime(held.path / live_file.NAME, (1128.0, 1128.0))
    watch = status.Watch(held.path)
    shown = to_json(watch.look(1130.0))
    assert (shown["step"], shown["metrics"], shown["own_shares"]) == (124, {"loss": 1.5}, [0.3, 0.9])
    assert (shown["slow_rank"], shown["slow_node"], shown["nodes"]) == (1, "h2", ["h1", "h2"])
    assert shown["live"] == {"from": "live.json", "age_s": 2.0}
    text = to_text(watch.look(1131.0))
    assert "live          as elsewhere told 3.0 s ago" in text
    assert "slow rank     rank 1 on h2: 90% of its time is its own" in text
    live_file.write(held.path, told(written=1123.0, step=125))  # whatever the clocks say, it is new now
    os.utime(held.path / live_file.NAME, (5.0, 5.0))
    assert to_json(watch.look(1132.0))["live"] == {"from": "live.json", "age_s": 0.0}
    assert to_json(watch.look(1133.5))["live"] == {"from": "live.json", "age_s": 1.5}


@pytest.mark.parametrize(
    "changes",
    [
        {"written": math.nan},
        {"written": 10**400},
        {"saved_time": math.inf},
        {"format": 2},
        {"run_id": "xyz"},
        {"epoch": 2},
        {"attempt": 0},
        {"written": 1121.0 - status.STALE - 1},
    ],
)
def test_a_live_file_of_something_else_is_ignored(held: Job, changes: dict[str, Any]) -> None:
    held.journal(elsewhere())
    live_file.write(held.path, told(**changes))
    shown = held.read()
    assert (shown["state"], shown["step"], shown["live"], shown["own_shares"]) == ("running", 100, None, [])


@pytest.mark.parametrize(
    "content",
    ["", '{"format":1,"run_id":"abc","ep', "[1]", "[" * 100_000, '{"format": 1, "step": "x"}', "\0" * 300],
)
def test_a_live_file_that_is_garbage_is_ignored(held: Job, content: str) -> None:
    held.journal(elsewhere())
    (held.path / live_file.NAME).write_text(content)
    assert held.read()["step"] == 100


def test_a_live_file_of_a_job_that_is_over_is_ignored(job: Job) -> None:
    job.journal(elsewhere())
    live_file.write(job.path, told())
    shown = job.read()
    assert (shown["state"], shown["step"], shown["live"]) == ("preempted", 100, None)


def test_on_the_leaders_host_it_adds_the_ranks_of_the_others(held: Job) -> None:
    held.journal(running())
    page = held.page(0, STEP=126)
    page[Word.OWN_SHARE] = struct.unpack("Q", struct.pack("d", 0.5))[0]
    shown = held.read()
    assert (shown["step"], shown["own_shares"]) == (126, []), "nobody says which rank's it is"
    live_file.write(held.path, told())
    shown = held.read()
    assert (shown["step"], shown["own_shares"], shown["slow_node"]) == (126, [0.3, 0.9], "h2")
    assert shown["live"]["from"] == "control pages"


def test_a_killed_supervisors_job_can_be_carried_on(job: Job) -> None:
    job.journal(running())
    job.page(0, STEP=170)
    shown = job.read()
    assert (shown["state"], shown["step"]) == ("preempted", 100)
    assert shown["reason"] == (
        f"its supervisor (pid 4711 on {socket.gethostname()}) died while the job was running; the same command carries on"
    )
    assert job.read(now=9e9)["goodput"] == shown["goodput"]


def test_a_job_that_has_only_just_begun(held: Job) -> None:
    shown = held.read()
    assert (shown["state"], shown["attempt"], shown["goodput"]) == ("new", None, 0.0)


def test_no_job_there(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no job in .*nowhere"):
        status.read_status(tmp_path / "nowhere", 0)
    assert not (tmp_path / "nowhere").exists()


def test_damage_is_shown(job: Job) -> None:
    job.journal(finished())
    with open(job.path / "journal" / "node.jsonl", "ab") as file:
        file.write(b"garbage\n" + encode(Progress(time=1300, attempt=1, step=3)))
    problems = job.read()["problems"]
    assert len(problems) == 2
    assert "line 19 is skipped: no JSON" in problems[0]
    assert "Progress cannot happen to a job that is completed" in problems[1]


def test_looking_does_not_hold_the_lock(job: Job) -> None:
    assert not is_held(job.path / "lock")
    with open(job.path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_held(job.path / "lock")
    assert not is_held(job.path / "missing")


def test_text(job: Job) -> None:
    job.journal(finished())
    text = to_text(status.read_status(job.path, 1281.0))
    assert text.splitlines() == [
        f"job           {job.path}",
        "state         completed: finished after all 200 steps",
        "progress      step 200 of 200, attempt 1, 2 ranks, loss 2",
        "snapshot      none",
        "checkpoint    step 80, 2 min ago, checkpoints/step-000000080",
        text.splitlines()[5],
        "time          productive 3 min, startup 11 s, teardown 10 s, redone 8.9 s",
        "last failure  crash in attempt 0, 3 min ago: rank 1 was killed by SIGKILL (after step 90)",
        f"supervisor    pid 4711 on {socket.gethostname()}, gone",
    ]
    assert text.splitlines()[5].endswith("%, 10 steps done again, 1 restart, 0 preemptions")


def test_the_deadline_of_a_live_job_is_shown_and_that_of_an_earlier_run_is_not(held: Job) -> None:
    facts = running()
    known = DeadlineSet(time=1121.0, source="SLURM's time limit", deadline=5000.0)
    held.journal([*facts, known])
    shown = status.read_status(held.path, 1400.0)
    assert to_json(shown)["deadline"] == {"source": "SLURM's time limit", "seconds": 3600.0}
    assert "deadline      SLURM's time limit in 60 min" in to_text(shown).splitlines()
    again = lifecycle.fold([*facts, known, replace(facts[0], time=1300.0, epoch=2)])
    assert again.deadline is None


def test_text_of_a_live_job_says_how_long_it_will_take(held: Job) -> None:
    held.journal(running())
    text = to_text(status.read_status(held.path, 1131.0))
    assert "progress      step 100 of 200, attempt 1, 2 ranks, 0.95 steps/s, 105 s to go, loss 2" in text
    assert f"pid 4711 on {socket.gethostname()}, at work" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0.0 s"),
        (0.42, "0.4 s"),
        (42, "42 s"),
        (180, "3 min"),
        (19200, "5 h 20 min"),
        (183600, "2 d 3 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(journals(), st.booleans(), st.none() | st.builds(Live, step=st.integers(0, 300)), st.floats(-100, 1e6))
def test_any_job_can_be_shown(facts: list[Fact], alive: bool, live: Live | None, later: float) -> None:
    record = lifecycle.fold(facts)
    now = (record.last_time or 0) + later
    shown = status.describe(Path("job"), record, now, alive=alive, live=live)
    plain = to_json(shown)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert 0 <= plain["goodput"] <= 1
    assert plain["limits"]["failures_left"] >= 0
    assert alive or State(plain["state"]) in (State.NEW, State.COMPLETED, State.PREEMPTED, State.FAILED)
    assert to_text(shown)


def test_numbers_that_json_lacks_are_null() -> None:
    record = JobRecord(metrics={"loss": float("nan")})
    assert to_json(status.describe(Path("job"), record, 0, alive=False))["metrics"] == {"loss": None}


def test_warnings_of_a_job_that_runs_and_what_the_guard_has_done(tmp_path: Path) -> None:
    job = Job(tmp_path)
    facts = running()
    begun, *others = facts
    skip = Skip(first=40, stop=42)
    rolled = Decided(
        time=1100.0,
        attempt=0,
        action=Action.ROLL_BACK,
        reason="rolling back",
        rollback=1,
        skip=skip,
        level=90,
    )
    others = [rolled if isinstance(fact, Decided) else fact for fact in others]
    warned = WarningRaised(
        time=1121.0, attempt=1, kind=WarningKind.PLATEAU, step=100, text="loss has not fallen"
    )
    job.journal([replace(begun, guard="nan"), *others, warned])
    record = status.read_status(job.path, 1125.0).record
    alive = status.describe(job.path, record, 1125.0, alive=True)
    assert to_json(alive)["guard"] == {
        "mode": "nan", "rollbacks": 1, "rollbacks_left": 2, "left_out": [[40, 42]], "levels": [90],
    }  # fmt: skip
    assert [(one["kind"], one["text"]) for one in to_json(alive)["warnings"]] == [
        ("plateau", "loss has not fallen")
    ]
    assert "warning       loss has not fallen" in to_text(alive)
    assert (
        "guard         nan, 1 rollback, left out: steps 40 to 41, new level of the loss: step 90"
        in to_text(alive)
    )
    over = status.describe(job.path, record, 1125.0, alive=False)
    assert not to_json(over)["warnings"]
    assert "\nwarning " not in to_text(over)
    taken_back = WarningCleared(time=1122.0, kind=WarningKind.PLATEAU, step=110)
    job.journal([replace(begun, guard="nan"), *others, warned, taken_back])
    assert not status.read_status(job.path, 1125.0).record.warnings
