"""What an attempt knows of its ranks from their control pages."""

from __future__ import annotations

import asyncio
import math
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from supervisor.attempt import ECHO_GRACE, Attempt
from supervisor.decide import classify
from supervisor.edge.control import ControlPage, Phase, SessionFlag, Word
from supervisor.guarding import Guarding
from supervisor.model import FailureKind, Raised
from supervisor.seat import Seat


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """Two ranks, seated."""
    one = Attempt(3, tmp_path / "attempt", tmp_path / "runtime", "run")
    one.world_size = one.local_size = 2
    for rank in range(2):
        page = ControlPage(tmp_path / f"rank-{rank}", create=True)
        one.seats[rank] = Seat(rank, rank, os.getpid(), None, page)
    return one


def test_no_save_is_agreed_while_a_rank_restores(attempt: Attempt) -> None:
    """Its page says step 0 until it has: a save would be proposed for a step that is long past."""
    pages = [seat.page for seat in attempt.seats.values()]
    assert not attempt.in_session
    for page in pages:
        page[Word.PHASE] = Phase.RESTORE
        page[Word.SESSION] = SessionFlag.OPEN
    assert not attempt.in_session
    pages[0][Word.STEP], pages[0][Word.PHASE] = 640, Phase.SETUP
    assert not attempt.in_session
    pages[1][Word.STEP], pages[1][Word.PHASE] = 640, Phase.SETUP
    assert attempt.in_session
    pages[1][Word.SESSION] |= SessionFlag.CLOSED
    assert not attempt.in_session


def test_the_first_number_that_went_wrong_is_told_whichever_is_heard_of_first(attempt: Attempt) -> None:
    guarding = Guarding(attempt)
    for rank, step in ((0, 23), (1, 22), (0, 24)):  # a nan on rank 1 is on both a step later
        message = {
            "finding": "nan", "metric": "loss", "step": step, "value": math.nan, "usual": None, "limit": None,
            "good": step - 1, "batches": {},
        }  # fmt: skip
        guarding.hear(attempt.seats[rank], message)
        assert attempt.ended.is_set()
    trouble = attempt.evidence().trouble
    assert trouble is not None
    assert (trouble.rank, trouble.step, trouble.good) == (1, 22, 21)


SHAPE = Raised(type="ValueError", message="shape", traceback="")
LOST = Raised(
    type="RuntimeError", message="gloo: Connection closed by peer", traceback="", bases=("RuntimeError",)
)
WRAPPED = Raised(
    type="train.StepFailed", message="in step 3", traceback=f"{LOST.message}\n\nDuring handling of"
)


@pytest.mark.parametrize(
    ("raised", "grace"), [(SHAPE, 0), (LOST, ECHO_GRACE), (WRAPPED, ECHO_GRACE), (None, ECHO_GRACE)]
)
def test_what_may_be_the_echo_of_another_failure_waits_for_it(
    attempt: Attempt, raised: Raised | None, grace: float
) -> None:
    """Once everything of the script's is done; the process itself may take its time to end."""

    async def fail() -> float:
        seat = attempt.seats[1]
        if raised is not None:
            attempt.raised(seat, raised)
        seat.told_code, seat.told_at = 1, 1.0
        attempt.left(seat)
        await attempt.ended.wait()
        return attempt._grace_after(seat)

    assert asyncio.run(fail()) == grace
    (end,) = attempt.evidence().ends
    assert (end.rank, end.exit_code, end.raised) == (1, 1, raised)


def test_an_exception_beside_a_rank_that_is_on_its_way_out_waits_for_that(attempt: Attempt) -> None:
    async def fail() -> bool:
        attempt.seats[0].pid = 1 << 22  # no such process: it has just gone
        attempt.raised(attempt.seats[1], SHAPE)
        attempt.seats[1].told_code = 1
        attempt.left(attempt.seats[1])
        await asyncio.sleep(0)
        return attempt.ended.is_set()

    assert not asyncio.run(fail())


def test_a_rank_that_leaves_its_loop_early_is_known_for_it_before_its_process_has_ended(
    attempt: Attempt,
) -> None:
    """The other one's exception is an echo: the connection was closed."""

    async def fail() -> None:
        early, other = attempt.seats.values()
        for seat in (early, other):
            seat.session = True
        early.told_code, early.told_at = 0, 1.0
        attempt.raised(other, LOST)
        other.told_code, other.told_at = 1, 2.0
        attempt.left(other)
        await attempt.ended.wait()

    asyncio.run(fail())
    failure = classify.classify(attempt.evidence(), 3.0)
    assert failure is not None
    assert (failure.kind, failure.rank) == (FailureKind.EARLY_EXIT, 0)


@pytest.mark.parametrize("code", [None, 1])
def test_what_was_called_off_elsewhere_may_have_its_cause_here(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """A rank has died, and torchrun, which has reaped it, has not said yet how; an exception may be an echo of what is elsewhere."""
    monkeypatch.setattr("supervisor.attempt.UNKNOWN_GRACE", 0.05)

    async def fail() -> None:
        seat = attempt.seats[1]
        seat.told_code = code
        attempt._worker_ended(seat)
        assert not attempt.ended.is_set()
        attempt.call_off()
        assert attempt.ended.is_set() is (code is not None)
        await asyncio.wait_for(attempt.ended.wait(), 30)

    asyncio.run(fail())
    assert attempt.called_off is (code is not None)
    assert [end.rank for end in attempt.evidence().ends] == [1]


def test_a_death_that_nobody_has_looked_at_yet_decides_too(attempt: Attempt) -> None:
    child = subprocess.Popen(["sleep", "600"])

    async def fail() -> None:
        seat = attempt.seats[1]
        seat.pid, seat.pidfd = child.pid, os.pidfd_open(child.pid)
        child.kill()
        select.select([seat.pidfd], [], [])
        attempt.call_off()
        assert not attempt.ended.is_set()
        await asyncio.wait_for(attempt.ended.wait(), 30)

    try:
        asyncio.run(fail())
    finally:
        child.wait()
    assert not attempt.called_off
    assert [(end.rank, end.signal) for end in attempt.evidence().ends] == [(1, signal.SIGKILL)]
