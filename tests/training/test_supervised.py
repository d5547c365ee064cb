"""Under a supervisor: save points, resuming, and what is told, over a real socket and real control pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.edge.control import Phase, SessionFlag, Word
from supervisor.model import ProposalFlag, ProposalState
from tests.training.harness import RankError, collect, launch, start
from tests.training.programs.awkward import many_epochs
from tests.training.programs.supervised import evaluate_behind, run
from tests.training.station import Station

LONG = 100_000_000  # steps that nobody waits for


def test_periodic_snapshots_go_round_the_slots(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2, every=(2,))
    results = launch(run, 2, 7, environ=station.environ)
    assert [result["seen"] for result in results] == [list(range(7))] * 2
    saved = station.of_kind("saved")
    assert sorted({(m["step"], m["slot"]) for m in saved})[:2] == [(2, 0), (4, 1)]
    assert {m["step"] for m in saved} >= {2, 7}, "the last step is always saved"
    assert all(m["bytes"] > 0 and m["seconds"] > 0 for m in saved)
    metrics = [m["metrics"] for m in saved if m["step"] == 7 and m["metrics"]]
    assert len(metrics) == 1, "only rank 0 sends metrics"
    assert metrics[0]["step"] == 6.0
    assert [m["completed"] for m in station.of_kind("closed")] == [True, True]
    for rank in range(2):
        page = station.page(rank)
        assert page[Word.STEP] == 7
        assert page[Word.TOTAL_STEPS] == 7
        assert page[Word.SAVED_STEP] == 8
        assert 0 < page[Word.SAVE_NS] < 60e9
        assert page[Word.PHASE] == Phase.CLOSED
        assert page[Word.SESSION] == SessionFlag.OPEN | SessionFlag.CLOSED
        assert page[Word.FIRST_STEP_NS] > 0
    resumed = Station(tmp_path / "s", 2, resume=(station.slot(saved[-1]["slot"]), 7))
    results = launch(run, 2, 9, environ=resumed.environ)
    assert results[0]["first"] == (7, True, 3)
    assert results[0]["seen"] == [7, 8]
    assert [m["step"] for m in resumed.of_kind("resumed")] == [7, 7]


def test_an_evaluation_waits_for_the_copy_that_runs_behind_the_step(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 1, every=(1,))
    (found,) = launch(evaluate_behind, 1, 12, environ=station.environ)
    assert found
    assert all(found)


def test_a_stop_saves_the_agreed_step_and_ends_the_worker(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2)
    with start(run, 2, LONG, environ=station.environ) as ranks:
        station.wait_for(
            lambda: len(station._pages) == 2 and all(p[Word.STEP] > 3 for p in station._pages.values())
        )
        step = max(page[Word.STEP] for page in station._pages.values()) + 2000
        station.propose(step, ProposalFlag.STOP | ProposalFlag.CHECKPOINT)
        assert collect(ranks) == [("exit", 0)] * 2
    assert {m["step"] for m in station.of_kind("saved")} == {step}
    assert [m["completed"] for m in station.of_kind("closed")] == [False, False]
    assert station.page(0)[Word.SESSION] & SessionFlag.CLOSED


def test_a_stop_at_the_last_step_of_a_loop_is_raised_by_the_next(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2)
    with start(many_epochs, 2, 50_000, environ=station.environ) as ranks:
        station.wait_for(
            lambda: len(station._pages) == 2 and all(p[Word.STEP] > 3 for p in station._pages.values())
        )
        step = (max(page[Word.STEP] for page in station._pages.values()) // 50_000 + 2) * 50_000
        station.propose(step, ProposalFlag.STOP | ProposalFlag.CHECKPOINT)
        assert collect(ranks) == [("exit", 0)] * 2
    assert max(m["step"] for m in station.of_kind("saved")) == step
    assert [m["step"] for m in station.of_kind("closed")] == [step, step]


def test_a_rank_at_a_proposed_step_waits_for_the_verdict(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2)
    with start(run, 2, LONG, environ=station.environ) as ranks:
        station.wait_for(
            lambda: len(station._pages) == 2 and all(p[Word.STEP] > 3 for p in station._pages.values())
        )
        step = max(page[Word.STEP] for page in station._pages.values()) + 2000
        station.propose(step, ProposalFlag.CHECKPOINT, ProposalState.PROPOSED)
        station.wait_for(lambda: len([m for m in station.heard if m["kind"] == "waiting"]) == 2)
        assert [station.page(rank)[Word.STEP] for rank in range(2)] == [step] * 2
        station.judge(ProposalState.ABORTED)
        station.wait_for(lambda: station.page(0)[Word.STEP] > step)
        assert not station.of_kind("saved")
        step = station.page(0)[Word.STEP] + 5000
        station.propose(step, ProposalFlag.STOP)
        collect(ranks)
    assert {m["step"] for m in station.of_kind("saved")} == {step}


def test_save_is_at_the_end_of_this_step(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2)
    launch(run, 2, 6, saves=[2], environ=station.environ)
    assert {m["step"] for m in station.of_kind("request")} == {3}
    assert {m["step"] for m in station.of_kind("saved")} == {3, 6}


def test_what_does_not_fit_is_said_and_not_loaded(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2)
    launch(run, 2, 3, environ=station.environ)
    other = Station(tmp_path / "s", 2, resume=(station.slot(0), 3))
    with pytest.raises(RankError, match=r"StateMismatchError.*model.weight is \[1, 4\], here \[1, 5\]"):
        launch(run, 2, 3, size=5, environ=other.environ)
    assert {m["damaged"] for m in other.of_kind("rejected")} == {False}


def test_a_damaged_state_is_rejected(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2)
    launch(run, 2, 3, environ=station.environ)
    file = station.slot(0) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    other = Station(tmp_path / "s", 2, resume=(station.slot(0), 3))
    with pytest.raises(RankError, match=r"CheckpointError.*truncated"):
        launch(run, 2, 3, environ=other.environ)
    assert {m["damaged"] for m in other.of_kind("rejected")} == {True}


def test_an_exception_saves_nothing_and_is_not_hidden(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2)
    with pytest.raises(RankError, match="ArithmeticError: on purpose"):
        launch(run, 2, 5, raise_at=3, environ=station.environ)
    assert not station.of_kind("saved")
    assert {m["completed"] for m in station.of_kind("closed")} == {False}


def test_leaving_the_loop_early_is_not_completion(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2)
    launch(run, 2, 5, break_at=3, environ=station.environ)
    assert [m["completed"] for m in station.of_kind("closed")] == [False, False]


def test_a_failed_save_harms_nothing(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2, every=(2,))
    (tmp_path / "r" / "slots").write_text("not a directory")
    results = launch(run, 2, 5, environ=station.environ)
    assert results[0]["seen"] == list(range(5))
    assert {m["step"] for m in station.of_kind("save_failed")} == {2, 4, 5}
    assert not station.of_kind("saved")


def test_one_rank_without_room_is_a_failure_on_all_and_leaves_no_files(tmp_path: Path) -> None:
    station = Station(tmp_path / "r", 2, every=(2,))
    results = launch(run, 2, 5, full_on=1, environ=station.environ)
    assert results[0]["seen"] == results[1]["seen"] == list(range(5))
    failed = station.of_kind("save_failed")
    assert [m["step"] for m in failed].count(5) == 8  # the last save is tried again, three times
    assert [m["step"] for m in failed].count(2) == 2  # that of 4 is skipped when the next slot comes too late
    assert all("rank 1: OSError: [Errno 27]" in m["reason"] for m in failed)
    assert not any(list(station.slot(index).iterdir()) for index in range(3))
