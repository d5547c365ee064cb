"""Stops: asked for by a deadline or a signal, and the time that they are given."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace

import pytest

from supervisor.deadlines import Deadlines
from supervisor.decide.deadline import LEAST, MARGIN, Deadline
from supervisor.edge import clock
from supervisor.model import DeadlineSet, Fact, StopCause, StopRequested
from supervisor.record import JobRecord, Point
from supervisor.stopping import Stopping
from supervisor.warden import Warden

GRACE = 60.0
DEADLINE = 30.0


class Ledger:
    """Keeps the facts, and shows the record that it was given."""

    def __init__(self, record: JobRecord | None = None) -> None:
        self.record = record or JobRecord()
        self.facts: list[Fact] = []

    def add(self, fact: Fact) -> None:
        self.facts.append(fact)


class Engine:
    """Says in order how far away the end is, in seconds; the last answer stands."""

    name, period = "a test", 3600.0

    def __init__(self, *ends: float | None) -> None:
        self.ends = list(ends)
        self.asked = 0

    async def deadline(self) -> Deadline | None:
        self.asked += 1
        end = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        now = clock.now()
        return None if end is None else Deadline(source="a limit", end=now + end, kill=now + end + 20)

    def leave(self, code: int) -> str | None:
        return None


def deadlines(engine: Engine, ledger: Ledger) -> tuple[Deadlines, list[Deadline]]:
    stops: list[Deadline] = []

    def stop(deadline: Deadline) -> bool:
        stops.append(deadline)
        return True

    return Deadlines(engine, ledger, GRACE, stop), stops  # type: ignore[arg-type]


def test_a_deadline_that_has_come_stops_the_job_at_once() -> None:
    ledger = Ledger()
    kept, stops = deadlines(Engine(0.0), ledger)
    asyncio.run(asyncio.wait_for(kept.watch(), DEADLINE))
    assert [stop.source for stop in stops] == ["a limit"]
    assert [type(fact) for fact in ledger.facts] == [DeadlineSet]


def test_a_deadline_that_is_far_away_is_looked_at_again() -> None:
    async def watched(engine: Engine) -> list[Deadline]:
        kept, stops = deadlines(engine, Ledger())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(kept.watch(), 0.05)
        return stops

    engine = Engine(7200.0)
    assert asyncio.run(watched(engine)) == []
    assert engine.asked == 1


def test_what_a_save_took_decides_how_early_the_stop_begins() -> None:
    async def due(record: JobRecord) -> float:
        kept, _ = deadlines(Engine(7200.0), Ledger(record))
        await kept.look()
        return kept._due()[0]

    saved, copied = Point(step=1, time=0.0, seconds=30.0), Point(step=1, time=0.0, seconds=1.0)
    measured = JobRecord(checkpoint=saved, snapshot=copied, rate=0.5)
    assert asyncio.run(due(measured)) == pytest.approx(7200 - LEAST - 2 * (30 + 1 + 2), abs=5)
    assert asyncio.run(due(JobRecord())) == pytest.approx(7200 - GRACE, abs=5)


def test_only_a_deadline_that_has_moved_is_news() -> None:
    async def looks(engine: Engine, ledger: Ledger) -> list[Deadline | None]:
        kept, _ = deadlines(engine, ledger)
        return [await kept.look() for _ in range(4)]

    ledger = Ledger()
    found = asyncio.run(looks(Engine(1000.0, 1001.0, None, 500.0), ledger))
    assert [
        round(fact.deadline - clock.now(), -2) for fact in ledger.facts if isinstance(fact, DeadlineSet)
    ] == [1000, 500]
    assert found[2] == found[1], "an engine that does not answer has not changed its mind"


def stopping(engine: Engine, ledger: Ledger, said: list[str], ended: list[str]) -> Stopping:
    console = SimpleNamespace(say=said.append)
    draining = SimpleNamespace(
        deadline=None, cancel=lambda: ended.append("drain"),
        seconds=None, under_way=None, leaves_out_newest=lambda: False,
    )  # fmt: skip
    return Stopping(
        engine, ledger, console, draining, GRACE,  # type: ignore[arg-type]
        begun=lambda: said.append("begun"), end=lambda: ended.append("attempt"),
        recalled=lambda: True, save=lambda: said.append("save"), warden=Warden(console),  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(("kill_in", "told"), [(None, GRACE), (3600.0, GRACE), (0.0, 20 - MARGIN)])
def test_a_signal_is_given_the_time_that_the_engine_has_for_it(kill_in: float | None, told: float) -> None:
    async def stopped() -> tuple[Stopping, list[str], Ledger]:
        said: list[str] = []
        ledger = Ledger()
        one = stopping(Engine(kill_in), ledger, said, [])
        one.on_signal(signal.SIGTERM)
        assert one.seen.is_set()
        await asyncio.gather(*one._tasks)
        one.on_signal(signal.SIGUSR1)  # again: the time still counts from the first
        await asyncio.gather(*one._tasks)
        return one, said, ledger

    one, said, ledger = asyncio.run(stopped())
    assert one.requested is not None
    assert (one.requested.cause, one.requested.source) == (StopCause.PREEMPTION, "SIGTERM")
    assert sum(isinstance(fact, StopRequested) for fact in ledger.facts) == 1
    assert one._draining.deadline - clock.monotonic() == pytest.approx(told, abs=5)
    assert said[:2] == ["SIGTERM: all ranks save the same step and stop; they have 60 s", "begun"]
    assert len(said) == (2 if told == GRACE else 3), said


def test_a_second_ctrl_c_ends_it_at_once_and_another_signal_does_not() -> None:
    async def stopped() -> tuple[Stopping, list[str]]:
        ended: list[str] = []
        one = stopping(Engine(None), Ledger(), [], ended)
        one.on_signal(signal.SIGINT)
        one.on_signal(signal.SIGTERM)
        assert ended == []
        one.on_signal(signal.SIGINT)
        await asyncio.gather(*one._tasks)
        return one, ended

    one, ended = asyncio.run(stopped())
    assert ended == ["drain", "attempt"]
    assert one.cut_short == "user"


def test_a_deadline_asks_for_a_stop_only_where_none_was_asked_for() -> None:
    async def stopped() -> list[str]:
        one = stopping(Engine(None), Ledger(), said := [], [])
        one.on_signal(signal.SIGTERM)
        one._on_deadline(Deadline(source="a limit", end=0, kill=0))
        other = stopping(Engine(None), Ledger(), said, [])
        other._on_deadline(Deadline(source="a limit", end=clock.now() + 40, kill=clock.now() + 60))
        assert other.requested is not None
        assert other.requested.deadline is not None
        return said

    said = asyncio.run(stopped())
    assert len(said) == 4
    assert said[2] == "a limit: all ranks save the same step and stop; they have 60 s (in 40 s)"


def test_an_engine_that_has_not_answered_yet_is_asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after its period, which is long: a signal may be the next that is heard."""
    monkeypatch.setattr("supervisor.deadlines._FIRST", 0.001)
    monkeypatch.setattr("supervisor.deadlines._SHORTEST", 0.0)
    engine = Engine(None, None, None, 0.0)
    kept, stops = deadlines(engine, Ledger())
    asyncio.run(asyncio.wait_for(kept.watch(), DEADLINE))
    assert len(stops) == 1
    assert engine.asked == 4
