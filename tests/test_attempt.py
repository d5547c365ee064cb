"""What an attempt knows of its ranks from their control pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.attempt import Attempt
from supervisor.edge.control import ControlPage, Phase, SessionFlag, Word
from supervisor.seat import Seat


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """Two ranks, seated."""
    one = Attempt(3, tmp_path / "attempt", tmp_path / "runtime", "run")
    one.world_size = 2
    for rank in range(2):
        page = ControlPage(tmp_path / f"rank-{rank}", create=True)
        one.seats[rank] = Seat(rank, rank, 1, None, page)
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
