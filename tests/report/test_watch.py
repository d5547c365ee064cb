"""``everstep status --watch``: a view that fits its terminal, whatever the job has been through."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from launch import view
from launch.trail import MOST_LOSSES, Trail
from launch.view import View
from supervisor.decide import lifecycle
from supervisor.edge.journal import encode
from supervisor.model import (
    AttemptEnded,
    AttemptStarted,
    DeadlineSet,
    Fact,
    Progress,
    State,
    StopCause,
    StopRequested,
    WarningKind,
    WarningRaised,
)
from supervisor.status import Status, describe
from tests.journals import journals
from tests.report.stories import Story, job_directory, life

ROOT = Path(__file__).parent.parent.parent


def trail_of(folder: Path, facts: list[Fact]) -> Trail:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "node.jsonl").write_bytes(b"".join(map(encode, facts)))
    trail = Trail(folder)
    trail.advance()
    return trail


def status_of(facts: list[Fact], *, alive: bool = True, now: float | None = None) -> Status:
    record = lifecycle.fold(facts)
    return describe(Path("/jobs/gpt"), record, now or record.last_time or 0.0, alive=alive)


def shown(status: Status, trail: Trail, width: int) -> list[str]:
    console = Console(
        width=width, force_terminal=True, no_color=True, color_system=None, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(View(status, trail))
    return re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).splitlines()


@given(journals(), st.integers(40, 130), st.booleans())
@settings(max_examples=40)
def test_it_fits_whatever_happened(
    tmp_path_factory: pytest.TempPathFactory, facts: list[Fact], width: int, alive: bool
) -> None:
    trail = trail_of(tmp_path_factory.mktemp("trail"), facts)
    status = status_of(facts, alive=alive)
    lines = shown(status, trail, width)
    assert max(map(len, lines)) <= width
    assert status.state.value in lines[0]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_it_shows(tmp_path: Path, width: int) -> None:
    facts = life(attempts=8, total=2000, every=10, pace=0.5)[:-4]
    status = replace(
        status_of(facts), own_shares={rank: 0.9 if rank == 3 else 0.4 for rank in range(16)}, rate=2.0
    )
    text = "\n".join(shown(status, trail_of(tmp_path, facts), width))
    words = " ".join(text.split())
    assert f"{status.step:,} of 2,000" in text
    assert "2 steps/s" in words
    assert "✗✗✗✗✗✗✗▶" in text
    assert re.search(r"loss +[▁▂▃▄▅▆▇█]+", text)
    assert re.search(r"3 ━+╌* 450 ms ◀ waited for", words)
    assert "busiest of 16 ranks; a step takes 500 ms" in words
    assert "of 5 failures" in words
    assert "7 restarts" in words


def test_the_losses_are_in_their_order_the_last_ones_of_attempts_too(tmp_path: Path) -> None:
    facts: list[Fact] = []
    for number in range(3):
        facts.append(AttemptStarted(time=float(number), attempt=number))
        for step, loss in ((1, 9.0), (2, 8.0)):
            facts.append(
                Progress(time=float(number), attempt=number, step=step, metrics={"loss": loss - number})
            )
        ended = {"loss": math.nan if number == 1 else 7.0 - number}
        facts.append(AttemptEnded(time=float(number), attempt=number, step=3, metrics=ended))
    trail = trail_of(tmp_path, facts)
    assert list(trail.losses) == [9, 8, 7, 8, 7, 7, 6, 5]
    assert trail.outcomes == dict.fromkeys(range(3), "stopped")


def test_a_stop_is_counted_down(tmp_path: Path) -> None:
    story = Story()
    story.run(1)
    story.facts[0] = replace(story.facts[0], settings={"grace": "60s"})  # type: ignore[call-arg]
    story.attempt(0, 0, 50, 100, every=10, pace=1.0)
    story.facts.append(StopRequested(time=story.time, cause=StopCause.PREEMPTION, source="SIGTERM"))
    status = status_of(story.facts, now=story.time + 15)
    assert status.state is State.STOPPING
    words = " ".join("\n".join(shown(status, trail_of(tmp_path, story.facts), 100)).split())
    assert "SIGTERM 15 s ago: all ranks save and stop, 45 s left of its time" in words


def test_warnings_and_deadlines_are_shown(tmp_path: Path) -> None:
    facts = life(attempts=1, total=200, every=10, pace=1.0)[:-4]
    status = status_of(facts)
    warning = WarningRaised(
        time=status.now, attempt=0, kind=WarningKind.PLATEAU, step=150, text="the loss stands still"
    )
    deadline = DeadlineSet(time=status.now, source="slurm time limit", deadline=status.now + 600)
    status = replace(status, record=status.record.with_(warnings=(warning,), deadline=deadline))
    words = " ".join("\n".join(shown(status, trail_of(tmp_path, facts), 80)).split())
    assert "warning the loss stands still" in words
    assert "notice slurm time limit in 10 min" in words


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    facts = life(attempts=1, total=200, every=10, pace=1.0)[:-4]
    status = replace(status_of(facts), metrics={"loss": float("nan"), "acc": float("inf")})
    text = "\n".join(shown(status, trail_of(tmp_path, facts), 80))
    assert re.search(r"loss .* nan", text)
    assert "acc inf" in text


def test_a_trail_reads_on_and_forgives(tmp_path: Path) -> None:
    facts = life(attempts=30, total=6000, every=10, pace=0.5)
    half = len(facts) // 2
    trail = trail_of(tmp_path, facts[:half])
    with (tmp_path / "node.jsonl").open("ab") as file:
        file.write(b'{"v":1,"fact":"AttemptEnded",garbage\n')
        file.writelines(map(encode, facts[half:-1]))
        file.write(encode(facts[-1])[:20])
    trail.advance()
    whole = trail_of(tmp_path / "whole", facts)
    assert trail.outcomes == whole.outcomes
    assert list(trail.outcomes) == list(range(30))
    assert trail.outcomes[9] == "stopped"
    assert trail.outcomes[29] == "finished"
    assert list(trail.losses)[-300:] == list(whole.losses)[-300:]
    assert 300 < len(whole.losses) <= len(trail.losses) <= MOST_LOSSES


def test_an_attempt_of_a_killed_supervisor_is_cut_off(tmp_path: Path) -> None:
    story = Story()
    story.run(1)
    story.attempt(0, 0, 50, 100, every=10, pace=1.0)
    story.run(2)
    assert trail_of(tmp_path, story.facts).outcomes == {0: "cut off"}


@pytest.mark.parametrize(
    ("term", "encoding", "can"),
    [("xterm", "utf-8", True), ("dumb", "utf-8", False), ("xterm", "ascii", False), ("xterm", None, False)],
)
def test_what_can_be_shown(
    monkeypatch: pytest.MonkeyPatch, term: str, encoding: str | None, can: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    assert view.can_show(encoding) is can


# --------------------------------------------------------------------------- in a real terminal


def watched(job: Path, *, term: str = "xterm-256color", columns: int = 40) -> tuple[int, str]:
    """The exit code, and all that it sent to a terminal of that width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {
        name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    argv = [sys.executable, "-m", "launch.cli", "status", "--watch", "--dir", str(job)]
    process = subprocess.Popen(
        argv, cwd=ROOT, env={**environment, "TERM": term, "PYTHONUTF8": "1"}, stdin=follower, stdout=follower, stderr=follower
    )  # fmt: skip
    os.close(follower)
    sent = bytearray()
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # nobody has it open any more
            break
        if not chunk:
            break
        sent += chunk
    os.close(leader)
    return process.wait(60), sent.decode()


def test_on_a_terminal_of_forty_columns(tmp_path: Path) -> None:
    job = job_directory(tmp_path / "gpt", life(attempts=12, total=2400, every=10, pace=0.5))
    code, sent = watched(job)
    assert code == 0
    assert "\x1b[?1049h" in sent  # a screen of its own, given back at the end
    last = sent.rpartition("\x1b[?1049l")[2]
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 40
    assert "completed" in last
    assert "finished after all 2400" in last


def test_on_a_dumb_terminal_it_is_plain(tmp_path: Path) -> None:
    job = job_directory(tmp_path / "gpt", life(attempts=2, total=100, every=10, pace=0.5))
    code, sent = watched(job, term="dumb")
    assert code == 0
    assert "\x1b" not in sent
    assert "state         completed" in sent


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda job: (job / "job.json").write_text('{"format": 99}'), "newer everstep"),
        (lambda job: (job / "journal" / "node.jsonl").rename(job / "journal" / "x") and (job / "journal" / "node.jsonl").mkdir(), "Is a directory"),
        (lambda job: job.rename(job.parent / "elsewhere"), "no job in"),
    ],
    ids=["newer", "unreadable", "gone"],
)  # fmt: skip
def test_what_cannot_be_watched_is_one_line(tmp_path: Path, damage: object, said: str) -> None:
    job = job_directory(tmp_path / "gpt", life(attempts=2, total=100, every=10, pace=0.5))
    damage(job)  # type: ignore[operator]
    code, sent = watched(job, columns=200)
    assert code == 78
    assert said in sent
    assert "Traceback" not in sent


def test_a_damaged_journal_is_watched_as_far_as_it_goes(tmp_path: Path) -> None:
    job = job_directory(tmp_path / "gpt", life(attempts=2, total=100, every=10, pace=0.5))
    with (job / "journal" / "node.jsonl").open("ab") as file:
        file.write(b'garbage\n{"v": 99, "fact": "Progress"}\n{"v": 1, "fa')
    code, sent = watched(job, columns=100)
    assert code == 0
    assert "2 lines cannot be used" in sent
