"""When the standby makes way for memory, and comes back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, cast

import pytest

from supervisor import standby as standbys
from supervisor.attempt import Attempt
from supervisor.edge import memory
from supervisor.edge.ports import ReservedPort
from supervisor.standby import Standby, Waiting

GB = 10**9


class Console:
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def console() -> Console:
    return Console()


def standby_of(console: Console, tmp_path: Path) -> Standby:
    nothing: Any = None
    return Standby(
        enabled=True, ahead=False, keep_free=2 * GB, launcher=nothing, folder_of=lambda n: tmp_path / str(n), welcome={},
        ledger=nothing, console=cast(Any, console),
    )  # fmt: skip


def test_it_is_dropped_when_less_than_the_limit_is_left_and_tried_again_later(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standbys, "LOOK", 0.001)
    left = [5 * GB, 3 * GB, 1 * GB]
    monkeypatch.setattr(memory, "available", lambda: left.pop(0) if len(left) > 1 else left[0])

    async def live() -> float:
        one = standby_of(console, tmp_path)
        one._tries = 2
        attempt = Attempt(1, tmp_path / "1", tmp_path / "runtime", "run", standby=1)
        one._waiting = Waiting(attempt, ReservedPort(), 0.0)
        one._waiting.attempt.world_size = 0  # every rank stands at the gate
        await one._watch_over(one._waiting)
        assert one._waiting is None
        assert one._tries == 3, "it was no fault of its own"
        assert one._timer is not None
        due = one._timer.when() - asyncio.get_running_loop().time()
        await one.drop()
        return due

    assert standbys.AGAIN - 10 < asyncio.run(live()) <= standbys.AGAIN
    assert console.said == ["the standby makes way: 1.0 GB of memory are available, 2.0 GB are to stay free"]
    assert not left[1:]


@pytest.mark.parametrize(("was_ready", "pause"), [(True, standbys.LATER), (False, None)])
def test_after_the_last_try_there_is_one_now_and_then_unless_it_cannot_even_start(
    console: Console, tmp_path: Path, was_ready: bool, pause: float | None
) -> None:
    async def live() -> float | None:
        one = standby_of(console, tmp_path)
        attempt = Attempt(1, tmp_path / "1", tmp_path / "runtime", "run", standby=1)
        one._waiting = Waiting(attempt, ReservedPort(), 0.0, was_ready=was_ready)
        attempt.ended.set()
        await one._watch_over(one._waiting)
        due = None if one._timer is None else one._timer.when() - asyncio.get_running_loop().time()
        await one.drop()
        return due

    due = asyncio.run(live())
    assert (due is None) is (pause is None)
    assert due is None or pause is None or pause - 10 < due <= pause
    (said,) = console.said
    assert said.startswith("the standby has ended")


def test_what_is_to_stay_free_is_needed_beside_what_it_takes(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "resident", lambda pids: 1 * GB)
    one = standby_of(console, tmp_path)
    beside = Attempt(0, tmp_path / "0", tmp_path / "runtime", "run")
    for there, room in ((4 * GB, True), (4 * GB - 1, False)):
        monkeypatch.setattr(memory, "available", lambda there=there: there)
        assert one._has_room(beside) is room
    assert console.said == ["no standby: 4.0 GB of memory are available, 4.0 GB would be needed"]


def test_the_default_limit_follows_the_lowest_limit_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "limit", lambda pid: None)
    assert memory.total() == host
    monkeypatch.setattr(memory, "limit", lambda pid: 7)
    assert memory.total() == 7
