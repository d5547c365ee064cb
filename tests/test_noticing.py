"""Notices during a run: what they bring about, what is saved in the time that is left, what can be taken back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.decide import lifecycle
from supervisor.decide.notices import Notice
from supervisor.edge import clock
from supervisor.engine import Alone
from supervisor.errors import ProtocolError
from supervisor.model import (
    DeadlineSet,
    Effect,
    Fact,
    NoticeReceived,
    NoticeWithdrawn,
    State,
    StopCause,
    StopRequested,
    StopWithdrawn,
)
from supervisor.noticing import Standing
from supervisor.record import JobRecord, Point
from supervisor.savepoints import SavePoints
from supervisor.stopping import Stopping
from supervisor.warden import Warden

GRACE = 60.0
MEASURED = JobRecord(
    snapshot=Point(step=90, time=0.0, seconds=1.0),
    checkpoint=Point(step=50, time=0.0, seconds=20.0),
    rate=1.0,
)


def notice(effect: Effect, seconds: float | None, key: str = "n1") -> Notice:
    end = None if seconds is None else clock.now() + seconds
    return Notice(source=f"a cloud: {key}", key=key, effect=effect, deadline=end, revocable=True)


class Source:
    """Tells what the test has it tell; acknowledges, or hangs."""

    name = "a cloud"

    def __init__(self, hangs: bool = False) -> None:
        self.hangs = hangs
        self.acknowledged: list[str] = []

    async def watch(self, standing: Standing, say: Callable[[str], None]) -> None:
        self.tell = standing
        await asyncio.Event().wait()

    async def acknowledge(self, notice: Notice) -> str | None:
        if self.hangs:
            await asyncio.Event().wait()
        self.acknowledged.append(notice.key)
        return f"{notice.key} acknowledged"


class Run:
    """A ``Stopping`` with nothing but its surroundings replaced; what it does is put down in order."""

    def __init__(
        self, record: JobRecord | None = None, recalls: bool = True, node: str | None = None, **draining: Any
    ) -> None:
        self.done: list[str] = []
        self.said: list[str] = []
        self.facts: list[Fact] = []
        self.source = Source()
        console: Any = SimpleNamespace(say=self.said.append)
        self.warden = Warden(console, self.source, node)
        means = {"seconds": None, "under_way": None, "leaves_out_newest": lambda: False} | draining
        self.stopping = Stopping(
            Alone(),
            SimpleNamespace(record=record or JobRecord(), add=self.facts.append),  # type: ignore[arg-type]
            console,
            SimpleNamespace(deadline=None, cancel=lambda: self.done.append("cancel"), **means),  # type: ignore[arg-type]
            GRACE,
            begun=lambda: self.done.append("stop"),
            end=lambda: self.done.append("end"),
            recalled=lambda: recalls,
            save=lambda: self.done.append("save"),
            warden=self.warden,
        )
        self.warden.attend(self.stopping)
        self.tell = self.warden.on_standing

    def of(self, kind: type[Fact]) -> list[Fact]:
        return [fact for fact in self.facts if isinstance(fact, kind)]


def within_a_loop(test: Callable[[], Any]) -> None:
    async def run() -> None:
        outcome = test()
        if asyncio.iscoroutine(outcome):
            await outcome

    asyncio.run(run())


def test_a_warning_saves_and_goes_on() -> None:
    def test() -> None:
        run = Run()
        run.tell((notice(Effect.WARN, 60),))
        assert run.done == ["save"]
        assert run.stopping.requested is None
        assert run.of(DeadlineSet) == []
        assert "a checkpoint is made, and the job goes on" in run.said[0]
        run.tell((notice(Effect.WARN, 60),))
        assert len(run.said) == 1, "once"

    within_a_loop(test)


def test_an_urgent_notice_stops_with_the_time_that_it_gives() -> None:
    def test() -> None:
        run = Run()
        run.tell((notice(Effect.STOP, 30),))
        assert run.done == ["stop"]
        stop = run.stopping.requested
        assert stop is not None
        assert (stop.cause, stop.source) == (StopCause.PREEMPTION, "a cloud: n1")
        assert run.stopping._patience == pytest.approx(28, abs=2)
        run.tell((notice(Effect.STOP, 30), notice(Effect.STOP, 10, "n2")))
        assert run.stopping._patience == pytest.approx(8, abs=2), "another one is nearer"
        assert run.done == ["stop"]

    within_a_loop(test)


@pytest.mark.parametrize(
    ("left", "draining", "done", "said"),
    [
        (60, {"leaves_out_newest": lambda: True}, ["stop"], "all ranks save the same step and stop"),
        (30, {"leaves_out_newest": lambda: True}, ["stop", "end"], "the snapshot in memory is made durable"),
        (15, {"under_way": 12.0}, ["stop", "end"], "the checkpoint that is being written is finished"),
    ],
)
def test_what_is_saved_depends_on_the_time_that_is_left(
    left: float, draining: dict[str, Any], done: list[str], said: str
) -> None:
    def test() -> None:
        run = Run(MEASURED, **draining)
        run.tell((notice(Effect.STOP, left),))
        assert run.done == done
        assert said in run.said[-1]
        assert run.stopping.cut_short == (None if len(done) == 1 else "plan")

    within_a_loop(test)


def test_a_far_deadline_is_saved_for_and_withdrawn() -> None:
    def test() -> None:
        run = Run()
        run.tell((notice(Effect.LEAVE, 7200),))
        assert run.done == ["save"]
        assert [fact.source for fact in run.of(DeadlineSet)] == ["a cloud: n1"]  # type: ignore[attr-defined]
        assert run.stopping._deadlines.nearest is not None
        run.tell(())
        assert run.stopping._deadlines.nearest is None
        assert run.stopping.requested is None
        assert run.said[-1] == "a cloud: n1: over, or withdrawn"
        assert len(run.of(NoticeWithdrawn)) == 1

    within_a_loop(test)


def test_a_deadline_that_comes_near_stops() -> None:
    async def test() -> None:
        run = Run(MEASURED)
        watch = asyncio.create_task(run.stopping._deadlines.watch())
        run.tell((notice(Effect.LEAVE, 7200),))
        await asyncio.sleep(0)
        assert run.stopping.requested is None
        run.tell((replace(notice(Effect.LEAVE, 7200), deadline=clock.now() + 0.001),))
        await asyncio.wait_for(watch, 30)
        assert run.stopping.requested is not None
        assert run.done == ["save", "save", "stop"]

    within_a_loop(test)


@pytest.mark.parametrize("recalls", [True, False])
def test_a_stop_that_has_become_needless(recalls: bool) -> None:
    def test() -> None:
        run = Run(recalls=recalls)
        run.tell((notice(Effect.STOP, 30),))
        run.tell(())
        assert run.stopping.seen.is_set() is not recalls
        assert (run.stopping.requested is None) is recalls
        assert len(run.of(StopWithdrawn)) == (1 if recalls else 0)
        (withdrawn,) = run.of(NoticeWithdrawn)
        assert withdrawn.too_late is not recalls  # type: ignore[attr-defined]
        assert run.said[-1].endswith("the job goes on" if recalls else "run it again")
        if recalls:
            assert run.stopping._draining.deadline is None
            run.tell((notice(Effect.STOP, 30),))
            assert run.done == ["stop", "stop"], "and it can be asked for again"

    within_a_loop(test)


def test_a_stop_that_somebody_else_wants_stands() -> None:
    def test() -> None:
        run = Run()
        run.tell((notice(Effect.STOP, 30), notice(Effect.STOP, 40, "n2")))
        run.tell((notice(Effect.STOP, 40, "n2"),))
        assert run.stopping.requested is not None
        assert run.of(StopWithdrawn) == []

    within_a_loop(test)


def test_what_was_over_before_does_not_stop_the_next_run() -> None:
    def test() -> None:
        run = Run()
        run.tell((notice(Effect.LEAVE, -60), notice(Effect.STOP, -60, "n2")))
        assert run.done == ["save"]

    within_a_loop(test)


def test_stops_are_acknowledged_and_warnings_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        run = Run()
        run.tell((notice(Effect.WARN, 60), notice(Effect.STOP, 30, "n2")))
        await run.warden.acknowledge()
        assert run.source.acknowledged == ["n2"]
        assert run.said[-1] == "n2 acknowledged"
        monkeypatch.setattr("supervisor.warden.ACKNOWLEDGE", 0.01)
        run.source.hangs = True
        await run.warden.acknowledge()
        assert "in time" in run.said[-1]

    within_a_loop(test)


def test_a_source_that_is_broken_is_said_and_ends_nothing() -> None:
    async def test() -> None:
        run = Run()

        async def broken(*_: object) -> None:
            raise RuntimeError("a bug")

        run.source.watch = broken  # type: ignore[method-assign]
        run.warden.listen()
        assert run.warden._watch is not None
        with contextlib.suppress(RuntimeError):
            await run.warden._watch
        await asyncio.sleep(0)
        assert "unexpected RuntimeError" in run.said[-1]

    within_a_loop(test)


# ------------------------------------------------------------------ the stop, as the ranks and the journal see it


def test_a_stop_is_recalled_from_the_ranks_only_before_they_heard_of_it() -> None:
    from supervisor.model import ProposalFlag

    attempt = SimpleNamespace(steps=[], in_session=False, seats={})
    savepoints = SavePoints(attempt)  # type: ignore[arg-type]
    assert not savepoints.recall_stop()
    savepoints.want(ProposalFlag.STOP | ProposalFlag.CHECKPOINT)
    assert savepoints.recall_stop()
    assert savepoints._wanted == ProposalFlag.CHECKPOINT, "the checkpoint is still welcome"
    savepoints._out, savepoints._wanted = ProposalFlag.STOP | ProposalFlag.CHECKPOINT, None
    assert not savepoints.recall_stop()


def test_a_job_that_was_asked_to_stop_and_goes_on() -> None:
    now = 100.0
    running = JobRecord(state=State.RUNNING, attempt=0)
    stop = StopRequested(time=now, cause=StopCause.PREEMPTION, source="a cloud", deadline=now + 30)
    received = NoticeReceived(time=now, source="a cloud", key="n1", effect=Effect.STOP)
    with_deadline = DeadlineSet(time=now, source="a cloud", deadline=now + 30)
    stopping = lifecycle.fold([received, with_deadline, stop], running)
    assert (stopping.state, stopping.stop) == (State.STOPPING, stop)
    withdrawn = [
        StopWithdrawn(time=now, source="a cloud"),
        NoticeWithdrawn(time=now, source="a cloud", key="n1"),
    ]
    again = lifecycle.fold(withdrawn, stopping)
    assert (again.state, again.stop, again.deadline) == (State.RUNNING, None, None)
    with pytest.raises(ProtocolError):
        lifecycle.apply(running, withdrawn[0])


# ------------------------------------------------------------------ several nodes: whose notice it is


class Others:
    """``Fellows``: those nodes can be spared that the test says."""

    def __init__(self, *spared: str) -> None:
        self.spared = spared
        self.leaving: dict[str, list[str]] = {}

    def go_on_without(self, node: str, source: str, deadline: float | None) -> bool:
        if node not in self.spared:
            return False
        self.leaving.setdefault(node, []).append(source)
        return True

    def keep(self, node: str, source: str) -> bool | None:
        return self.leaving.pop(node, None) is not None or None


def several(*spared: str, **more: Any) -> tuple[Run, Others]:
    run, others = Run(node="h1", **more), Others(*spared)
    run.stopping.fellows = others
    return run, others


def test_the_journal_tells_whose_notice_it_was() -> None:
    def test() -> None:
        run, _ = several()
        run.tell((notice(Effect.WARN, 60),))
        run.stopping.on_nodes_notices("h2", (notice(Effect.WARN, 60),))
        run.stopping.on_nodes_notices("h2", (notice(Effect.WARN, 60),))
        assert run.done == ["save", "save"], "each is another one, though their keys are the same"
        received = run.of(NoticeReceived)
        assert [fact.node for fact in received] == ["h1", "h2"]  # type: ignore[attr-defined]
        assert [fact.source for fact in received] == ["a cloud: n1 on h1", "a cloud: n1 on h2"]  # type: ignore[attr-defined]
        run.stopping.on_nodes_notices("h2", ())
        assert run.said[-1] == "a cloud: n1 on h2: over, or withdrawn"
        assert [fact.source for fact in run.of(NoticeWithdrawn)] == ["a cloud: n1 on h2"]  # type: ignore[attr-defined]

    within_a_loop(test)


def test_a_node_that_can_be_spared_stops_nobody_and_one_that_cannot_stops_all() -> None:
    def test() -> None:
        run, others = several("h2")
        run.stopping.on_nodes_notices("h2", (notice(Effect.STOP, 10),))
        assert others.leaving == {"h2": ["a cloud: n1 on h2"]}
        assert run.done == []
        run.stopping.on_nodes_notices("h3", (notice(Effect.STOP, 20),))
        assert run.done == ["stop"]
        stop = run.stopping.requested
        assert stop is not None
        assert stop.source == "a cloud: n1 on h3"
        assert run.stopping._patience == pytest.approx(8, abs=2), "all of them go, by the nearest"

    within_a_loop(test)


def test_the_leaders_own_notice_is_one_of_a_node() -> None:
    def test() -> None:
        run, others = several("h1")
        run.tell((notice(Effect.STOP, 30),))
        run.stopping.on_signal(signal.SIGTERM)
        assert others.leaving == {"h1": ["a cloud: n1 on h1", "SIGTERM on h1"]}
        assert run.stopping.requested is None
        run.stopping.on_signal(signal.SIGINT)
        assert run.stopping.requested is not None
        assert run.stopping.requested.cause is StopCause.USER

    within_a_loop(test)


def test_under_a_scheduler_a_signal_to_the_leader_is_for_all() -> None:
    def test() -> None:
        run, others = several("h1")
        run.stopping._has_engine = True
        run.stopping.on_signal(signal.SIGTERM)
        assert others.leaving == {}
        assert run.done == ["stop"]

    within_a_loop(test)


def test_a_deadline_of_one_node_is_kept_by_that_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.deadlines._SHORTEST", 0.001)

    async def test() -> None:
        run, others = several("h2", record=MEASURED)
        watch = asyncio.create_task(run.stopping._deadlines.watch())
        run.stopping.on_nodes_notices("h2", (notice(Effect.LEAVE, 0.001),))
        run.stopping.on_nodes_notices("h3", (notice(Effect.LEAVE, 7200),))
        async with asyncio.timeout(30):
            while not others.leaving:
                await asyncio.sleep(0)
        assert run.stopping.requested is None
        nearest = run.stopping._deadlines.nearest
        assert nearest is not None
        assert nearest.node == "h3", "the next one counts now"
        run.stopping.left("h2")
        others.leaving.clear()
        run.stopping.on_nodes_notices("h3", (notice(Effect.LEAVE, 0.001),))
        await asyncio.wait_for(watch, 30)
        assert run.stopping.requested is not None
        assert run.stopping.requested.source == "a cloud: n1 on h3"
        assert len(run.of(NoticeWithdrawn)) == 1, "that of a node that is gone"

    within_a_loop(test)


def test_what_was_to_come_over_a_node_is_withdrawn_from_that_node() -> None:
    def test() -> None:
        run, others = several("h2", "h3")
        run.stopping.on_nodes_notices("h2", (notice(Effect.STOP, 30),))
        run.stopping.on_nodes_notices("h3", (notice(Effect.STOP, 30),))
        run.stopping.on_nodes_notices("h2", ())
        assert set(others.leaving) == {"h3"}
        assert run.said[-1] == "a cloud: n1 on h2: over, or withdrawn; the job goes on"

    within_a_loop(test)


def test_a_signal_is_never_withdrawn() -> None:
    def test() -> None:
        run = Run()
        run.tell((notice(Effect.STOP, 30),))
        run.warden._on_signal(signal.SIGTERM)
        run.tell(())
        assert run.stopping.requested is not None, "the signal asks for it, too"
        assert run.of(StopWithdrawn) == []

    within_a_loop(test)


# ------------------------------------------------------------------ a node that follows: the leader is told


def follower() -> tuple[Warden, Source, list[str], list[bool]]:
    said: list[str] = []
    told: list[bool] = []
    source = Source()
    warden = Warden(SimpleNamespace(say=said.append), source, "h2")  # type: ignore[arg-type]
    warden.changed = lambda: told.append(True)
    return warden, source, said, told


def test_a_follower_tells_what_has_changed_and_keeps_it_until_it_leads() -> None:
    def test() -> None:
        warden, _, said, told = follower()
        warden.on_standing((notice(Effect.LEAVE, 7200),))
        warden.on_standing((notice(Effect.LEAVE, 7200.5),))
        assert said == ["a cloud: n1: the leader is told"]
        assert len(told) == 1
        assert warden.must_leave is None, "not yet"
        run = Run(node="h2")
        warden.attend(run.stopping)
        assert run.done == ["save"]
        assert [fact.source for fact in run.of(NoticeReceived)] == ["a cloud: n1 on h2"]  # type: ignore[attr-defined]
        warden.attend(None)
        warden.on_standing((notice(Effect.LEAVE, 7200), notice(Effect.STOP, 30, "n2")))
        assert warden.must_leave is not None
        assert warden.must_leave.source == "a cloud: n2"
        warden.on_standing(())
        assert warden.must_leave is None
        assert said[-1] == "a cloud: n2: over, or withdrawn; the leader is told"

    within_a_loop(test)


def test_a_signal_outlives_the_change_of_a_nodes_part() -> None:
    def test() -> None:
        warden, _, said, _ = follower()
        first = Run(node="h2")
        warden.attend(first.stopping)
        warden._on_signal(signal.SIGINT)
        assert first.done == ["stop"]
        warden.attend(None)  # deposed
        assert warden.must_leave is not None
        assert warden.must_leave.cause is StopCause.USER
        second = Run(node="h2")
        warden.attend(second.stopping)
        assert second.done == ["stop"]
        assert said == []

    within_a_loop(test)


def test_a_follower_acknowledges_what_takes_its_machine() -> None:
    async def test() -> None:
        warden, source, said, _ = follower()
        warden.on_standing((notice(Effect.WARN, 60), notice(Effect.STOP, 30, "n2")))
        await warden.acknowledge()
        assert source.acknowledged == ["n2"]
        assert said[-1] == "n2 acknowledged"

    within_a_loop(test)
