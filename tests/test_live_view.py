"""The live file as the supervisor keeps it: small, seldom, never in its way."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor import live_view
from supervisor.edge import clock, live_file
from supervisor.edge.control import ControlPage, Word
from supervisor.live_view import LiveView


class Bench:
    """An attempt of two nodes, seen by the one that leads, at times that the test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.said, self.now = folder, list[str](), 100.0
        self.page = ControlPage(folder / "rank-0", create=True)
        self.page[Word.STEP] = 7
        others = SimpleNamespace(own_shares={1: 0.9}, nodes=("h1", "h2"))
        seats = {0: SimpleNamespace(rank=0, page=self.page)}
        self.attempt: Any = SimpleNamespace(number=3, seats=seats, others=others, world_size=2, steps=[7, 6])
        self.view = LiveView(folder, "run", 4, self.said.append)
        self.writes: list[live_file.Told] = []
        self.write = live_file.write
        monkeypatch.setattr(clock, "monotonic", lambda: self.now)
        monkeypatch.setattr(
            live_file, "write", lambda job, told: (self.writes.append(told), self.write(job, told))
        )

    async def look(self, later: float) -> None:
        self.now += later
        self.view.look(self.attempt)
        if self.view._writing is not None:
            await self.view._writing


def run(bench: Bench, test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(bench), 30))
    bench.page.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_it_is_written_when_something_has_changed_and_removed_in_the_end(bench: Bench) -> None:
    async def test(bench: Bench) -> None:
        await bench.look(0)
        found = live_file.read(bench.folder)
        assert found is not None
        told = found[0]
        assert (told.epoch, told.attempt, told.step, told.own_shares, told.nodes) == (
            4,
            3,
            6,
            (-1, 90),
            ("h1", "h2"),
        )
        bench.attempt.steps = [8, 8]
        await bench.look(live_view.PERIOD / 2)
        assert len(bench.writes) == 1, "too soon"
        await bench.look(live_view.PERIOD / 2)
        await bench.look(live_view.PERIOD)
        assert [each.step for each in bench.writes] == [6, 8]
        await bench.look(live_view.AGAIN)  # to tell that it is not left from earlier
        assert replace(bench.writes[2], written=0) == replace(bench.writes[1], written=0)
        await bench.view.close()
        assert sorted(os.listdir(bench.folder)) == ["rank-0"]

    run(bench, test)


def test_what_cannot_be_written_is_said_once_and_leaves_nothing(bench: Bench) -> None:
    async def test(bench: Bench) -> None:
        good = bench.folder
        bench.view._job = bench.folder / "gone"
        for step in range(5):
            bench.attempt.steps = [step]
            await bench.look(live_view.PERIOD)
        assert len(bench.said) == 1
        assert "other hosts see what the journal says" in bench.said[0]
        bench.view._job = good
        await bench.look(live_view.AGAIN)
        assert live_file.read(good) is not None
        await bench.view.close()

    run(bench, test)


def test_a_file_system_that_hangs_is_not_waited_for(bench: Bench) -> None:
    async def test(bench: Bench) -> None:
        goes_on = threading.Event()
        bench.write = lambda _job, _told: goes_on.wait() and None
        for step in range(5):
            bench.attempt.steps = [step]
            bench.now += live_view.PERIOD
            bench.view.look(bench.attempt)
            await asyncio.sleep(0)
        newest = bench.view.newest
        assert newest is not None
        assert newest[1].step == 4
        goes_on.set()
        await bench.view.close()
        assert len(bench.writes) == 1

    run(bench, test)
