"""``everstep simulate``: what it prints, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from launch.cli import call
from supervisor.decide.simulation import Blow, Costs, Plan, simulate
from supervisor.edge.journal import Journal
from supervisor.model import Fact
from tests.decide.test_simulation import DAY, PLENTY, poisson

SHORT = ("--time", "5d", "--runs", "2")


def test_a_published_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["simulate", "--preset", "llama3", "--step-time", "5s", *SHORT]) == 0
    told = capsys.readouterr().out
    assert "arXiv:2407.21783" in told
    assert "failure every 3.09 h" in told
    for words in ("goodput", "productive", "redone", "startup", "stopped", "checkpoints"):
        assert words in told


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--mtbf", "3h", "--node-share", "0.5", "--json", *SHORT]
    assert call(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["runs"]) == 2
    for run in told["runs"]:
        assert sum(run["seconds"].values()) == pytest.approx(run["wall_seconds"])
        assert run["state"] in ("running", "starting", "restarting")
    assert told["effective_least"] <= told["effective"] <= told["effective_most"]
    assert told["assumptions"]["shares"] == {"node": 0.5}
    assert call(words) == 0
    assert json.loads(capsys.readouterr().out) == told  # the seed decides
    assert call([*words, "--seed", "7"]) == 0
    assert json.loads(capsys.readouterr().out) != told


def test_half_the_gpus_fail_half_as_often(capsys: pytest.CaptureFixture[str]) -> None:
    rates = []
    for gpus in ("16384", "8192"):
        assert call(["simulate", "--gpus", gpus, "--json", *SHORT]) == 0
        rates.append(json.loads(capsys.readouterr().out)["assumptions"]["mtbf"])
    assert rates[1] == pytest.approx(2 * rates[0])


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_a_sweep_marks_the_best_and_draws_it(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"sweep.{suffix}"
    assert call(["simulate", "--preset", "llama3", "--sweep", "-o", str(file), *SHORT]) == 0
    told = capsys.readouterr().out.splitlines()
    (marked,) = [row for row in told if row.startswith("*  ")]
    best = marked.split()[1]
    picture = file.read_text()
    assert f"<title>{best}: " in picture
    assert ", the best</title>" in picture
    assert "checkpoint interval" in picture
    if suffix == "svg":
        ET.fromstring(picture)


def test_costs_and_failures_of_a_job_that_has_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts: list[Fact] = []
    plan = Plan(seconds=20 * DAY, limits=PLENTY, checkpoint_every=600.0)
    outcome = simulate(
        plan, Costs(step=4.0, drain=33.0), poisson(DAY / 6, Blow.PROCESS, Blow.NODE), facts.append
    )
    journal = Journal(tmp_path / "journal" / "host.jsonl")
    for fact in facts:
        journal.append(fact)
    journal.close()
    words = ["simulate", "--dir", str(tmp_path), "--time", "20d", "--checkpoint-every", "600s", "--json"]
    assert call(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["assumptions"]["costs"]["drain"] == pytest.approx(33.0)
    assert {"step", "drain", "stall", "startup"} <= set(told["assumptions"]["measured"])
    assert told["goodput"] == pytest.approx(outcome.goodput, abs=0.03)
    assert call(["simulate", "--dir", str(tmp_path), *SHORT]) == 0
    assert "measured: step 4 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --mtbf TIME, --preset NAME, --gpus N or --dir D"),
        (["--preset", "gpt5"], "allowed are llama3, opt-175b"),
        (["--preset", "llama3", "--dir", "x"], "give one of them"),
        (["--mtbf", "soon"], "--mtbf: 'soon' is no duration"),
        (["--mtbf", "0s"], "--mtbf: longer than 0"),
        (["--mtbf", "1h", "--step-time", "0s"], "longer than 0"),
        (["--mtbf", "1h", "--checkpoint-every", "often"], "--checkpoint-every: 'often' is no interval"),
        (["--mtbf", "1h", "--snapshot-every", "auto"], "--snapshot-every: 'auto' is no interval"),
        (["--mtbf", "1h", "--node-share", "2"], "--node-share 2: from 0 to 1"),
        (["--mtbf", "1h", "--node-share", "0.7", "--hang-share", "0.7"], "sum to more than 1"),
        (["--mtbf", "1h", "--runs", "0"], "--runs 0: at least 1"),
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--mtbf", "1h", "-o", "x.svg"], "give --sweep too"),
        (["--mtbf", "1h", "--sweep", "-o", "x.gif"], "ending in .svg or .html"),
        (["--mtbf", "1h", "--steps", "0"], "steps 0: more than 0"),
    ],
)
def test_wrong_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["simulate", *words]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
