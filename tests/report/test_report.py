"""The document and the file of ``everstep report``: what is in it, and what becomes of bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cli, pages
from supervisor import report
from supervisor.errors import JobError
from supervisor.report import Reporter
from tests.report import stories
from tests.report.stories import HOSTILE, Story, evidence, job_directory, life

ROOT = Path(__file__).parent.parent.parent
NEWER = b'{"v": 99, "fact": "Progress", "time": 1.0}\n'


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return job_directory(tmp_path / "gpt", life(attempts=12, total=2400, every=10, pace=0.5, seed=1))


def document(job: Path, now: float = stories.BEGAN + 1e6) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(Reporter(job).document(now), allow_nan=False))
    return plain


def in_page(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    plain: dict[str, Any] = json.loads(found[1])
    return plain


def test_a_document_tells_the_story(job: Path) -> None:
    evidence(job, 1)
    told = document(job)
    assert told["status"]["state"] == "completed"
    assert [each["attempt"] for each in told["attempts"]] == list(range(12))
    assert [run["exit_code"] for run in told["runs"]] == [75, 0]
    first, second = told["attempts"][:2]
    assert (first["outcome"], first["failure"]["kind"], first["standby"]) == ("failed", "crash", False)
    assert second["evidence"]["stacks"]["1"].startswith("Current thread")
    assert second["evidence"]["ends"][0]["last_lines"][0] == "[rank1] step 16"
    assert first["evidence"]["problem"] == "No such file or directory"
    assert told["attempts"][9]["stop"] == "SIGTERM"
    assert told["attempts"][-1]["outcome"] == "finished"
    assert sum(each["lost"] for each in told["attempts"]) == told["status"]["lost_steps"] > 0
    by_name = {metric["name"]: metric for metric in told["metrics"]}
    assert list(by_name) == ["loss", "grad_norm", "lr"]
    assert by_name["loss"]["not_finite_count"] > 0
    assert by_name["lr"]["not_finite_count"] == 0
    whole = [sum(row[index] for row in told["ribbon"]["columns"]) for index in range(8)]
    assert whole == pytest.approx(list(told["status"]["seconds"].values()), abs=0.5)


def test_a_reporter_reads_only_what_is_new(job: Path) -> None:
    reporter = Reporter(job)
    before = reporter.document(stories.BEGAN + 1e6)
    read = reporter.facts
    more = Story()
    more.time = stories.BEGAN + 1e6
    more.run(3)
    with (job / "journal" / "node.jsonl").open("ab") as file:
        file.writelines(map(stories.encode, more.facts))
    after = reporter.document(stories.BEGAN + 1e6 + 1)
    assert reporter.facts == read + 1
    assert len(after["runs"]) == len(before["runs"]) + 1
    assert (
        after["attempts"][:-1] == before["attempts"][:-1]
    )  # the last one's has the time without a supervisor


def test_a_long_metric_is_thinned_and_says_so(tmp_path: Path) -> None:
    job = job_directory(tmp_path / "long", life(attempts=3, total=9000, every=1, pace=0.1))
    loss = document(job)["metrics"][0]
    assert loss["count"] > 8900
    assert loss["shown"] <= 4 * (report.COLUMNS + 3)
    story = Reporter(job)
    story.status(stories.BEGAN + 1e6)
    values = [y for stretch in loss["stretches"] for y in stretch[2]]
    raw = [v for v in story._told.chronicle.metrics["loss"].values if v == v]
    assert (min(values), max(values)) == pytest.approx((min(raw), max(raw)), rel=1e-5)


def test_evidence_is_left_out_where_it_would_be_too_much(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_EVIDENCE", 5000)
    for attempt in range(9):
        evidence(job, attempt, text="x" * 4000)
    found = {each["attempt"]: each["evidence"] for each in document(job)["attempts"] if each["failure"]}
    assert "stacks" in found[8]
    assert found[0] == {"path": str(job / "attempts" / "000000" / "failure.json"), "left_out": True}


def test_a_long_stack_is_cut_and_says_so(job: Path) -> None:
    evidence(job, 1, text="y" * (report.MOST_TEXT + 500))
    stack = document(job)["attempts"][1]["evidence"]["stacks"]["0"]
    assert len(stack) < report.MOST_TEXT + 100
    assert stack.endswith("characters more")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"evidence": {"ends": 3}}', "\udcff"])
def test_damaged_evidence_is_said(job: Path, content: str) -> None:
    evidence(job, 1)
    (job / "attempts" / "000001" / "failure.json").write_text(content, errors="surrogateescape")
    assert document(job)["attempts"][1]["evidence"]["problem"] == "not a file of this version"


def test_what_a_job_says_is_never_markup(job: Path) -> None:
    evidence(job, 1, text=HOSTILE)
    page = pages.render({**document(job), "name": HOSTILE})
    assert page.count("<script") == page.count("</script") == 2  # the data, the program
    assert in_page(page)["attempts"][1]["failure"]["reason"] == HOSTILE
    assert "default-src &#x27;none&#x27;" in page
    assert not re.search(r'(src|href)="?(https?:)?//', page)


# --------------------------------------------------------------------------- the command, and bad input


def test_the_file_is_written_whole(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.html"
    file.write_text("old")
    assert cli.call(["report", "--dir", str(job), "-o", str(file)]) == 0
    assert "12 attempts" in capsys.readouterr().out
    assert in_page(file.read_text())["name"] == "gpt"
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
    assert cli.call(["report", "--dir", str(job), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "gpt"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["report", "--dir", "{tmp}/none"], 78, "no job in"),
        (["report", "--dir", "{job}", "-o", "x.pdf"], 64, "ending in .html"),
        (["report", "--dir", "{job}", "-o", "{tmp}/no/such/x.html"], 1, "No such file or directory"),
        (["report", "--dir", "{job}", "-o", "{tmp}/file/x.html"], 1, "Not a directory"),
        (["report", "--dri", "{job}"], 64, "did you mean --dir?"),
        (["serve", "--dir", "{tmp}/none"], 78, "no job in"),
        (["serve", "--dir", "{job}", "--port", "99999"], 64, "0 to 65535"),
        (
            ["serve", "--dir", "{job}", "--address", "192.0.2.1", "--port", "0"],
            64,
            "cannot listen on 192.0.2.1",
        ),
    ],
)
def test_bad_words_get_one_line(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    (tmp_path / "file").touch()
    assert cli.call([word.format(tmp=tmp_path, job=job) for word in words]) == code
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("everstep: ")
    assert said in err


def test_a_damaged_journal_is_told_as_far_as_it_can_be_read(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = job / "journal" / "node.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    middle = next(n for n in range(len(lines) // 2, len(lines)) if b"SnapshotCompleted" in lines[n])
    lines[middle] = b"\x00garbage\xff\n"
    file.write_bytes(b"".join(lines) + NEWER + lines[0][:40])
    assert cli.call(["report", "--dir", str(job), "-o", str(tmp_path / "out.html")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert f"line {middle + 1} is skipped: no JSON" in said[0]
    assert "newer everstep (journal version 99" in said[1]
    told = in_page((tmp_path / "out.html").read_text())
    assert told["status"]["problems"] == [line.removeprefix("everstep: ") for line in said]
    assert len(told["attempts"]) == 12


@pytest.mark.parametrize("command", ["report", "serve"])
def test_a_journal_of_a_newer_version_is_refused(
    job: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (job / "journal" / "node.jsonl").write_bytes(NEWER * 3)
    assert cli.call([command, "--dir", str(job)]) == JobError.exit_code
    assert "newer everstep" in capsys.readouterr().err


def test_a_journal_that_may_not_be_read(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = job / "journal" / "node.jsonl"
    file.unlink()
    file.mkdir()  # nobody may read that, root neither
    assert cli.call(["report", "--dir", str(job)]) == JobError.exit_code
    assert "Is a directory" in capsys.readouterr().err


def test_a_job_before_its_first_attempt(tmp_path: Path) -> None:
    story = Story()
    story.run(1)
    told = document(job_directory(tmp_path / "new", story.facts))
    assert told["attempts"] == told["metrics"] == told["checkpoints"] == []


def test_a_closed_pipe_is_no_error(job: Path) -> None:
    argv = [sys.executable, "-m", "launch.cli", "report", "--dir", str(job), "-o", "-"]
    reads, writes = os.pipe()
    os.close(reads)
    result = subprocess.run(argv, cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writes)
    assert (result.returncode, result.stderr) == (141, b"")
