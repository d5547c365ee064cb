"""What a leader makes of its nodes' reports: real store, real orders, nodes that say what the test has them say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path

from supervisor.attempt import Attempt
from supervisor.config import Options
from supervisor.decide.membership import Size
from supervisor.edge.console import Console
from supervisor.edge.journal import Journal
from supervisor.edge.store.memory import MemoryStore
from supervisor.fleet import NODES, Answer, Assignment, Course, Ended, Member, Order, Report, Saved
from supervisor.joining import Joining, new_life, until
from supervisor.lead import Lead
from supervisor.ledger import Ledger
from supervisor.model import ProposalFlag, ProposalState
from supervisor.papers import encoded
from supervisor.replay import Replay
from supervisor.shared_snapshots import SharedSnapshots

DEADLINE = 30.0
NAMES = ("a", "b", "c")


class Led:
    """A leader of three nodes in an attempt."""

    def __init__(
        self, folder: Path, store: MemoryStore, joining: Joining, ledger: Ledger, console: Console
    ) -> None:
        self.store, self.joining = store, joining
        snapshots = SharedSnapshots(folder, run_id="run", key=None, fact=lambda _fact: None)
        size = Size(least=3, most=3)
        options = Options(peer_copies="off", standby="off")
        self.lead = Lead(
            joining, store, options, ledger, console, snapshots, size=size, epoch=1, run_id="run"
        )
        self.attempt = Attempt(0, folder / "attempt", folder, "run", nodes=3)
        self.whole: list[int] = []
        self.lead.rounds.on_saved = lambda step, _flags: self.whole.append(step)
        course = Course(attempt=0, world_size=3, in_session=True, has_session=True)
        self.reports = {
            name: Report(name=name, life=name, host=name, pid=1, address="h", port=1, shown=2, course=course)
            for name in NAMES
        }

    async def begin(self) -> None:
        self.lead.start(lambda: None)
        for name in NAMES:
            await self.say(name)
        await self.until(lambda: self.lead.roster.reports.keys() >= set(NAMES))
        members = tuple(Member(name=name, life=name) for name in NAMES)
        peers = self.lead.roster.peers(members)
        assignment = Assignment(attempt=0, members=members, address="h", port=1, peers=peers)
        self.lead.roster.assignment = assignment
        self.lead.begin(self.attempt, assignment)

    @property
    def order(self) -> Order:
        """As the store has it, read as any node reads it."""
        return self.joining.order or self.lead.order

    async def say(self, name: str, **changes: object) -> None:
        self.reports[name] = replace(self.reports[name], **changes)  # type: ignore[arg-type]
        await self.store.put(NODES + name, encoded(self.reports[name]))

    async def course(self, name: str, **changes: object) -> None:
        course = self.reports[name].course
        assert course is not None
        await self.say(name, course=replace(course, **changes))  # type: ignore[arg-type]

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await asyncio.sleep(0.005)

    async def answer(self, *, confirmed: bool) -> None:
        """All confirm what is proposed, or c does not."""
        await self.until(lambda: self.order.proposal.state is ProposalState.PROPOSED)
        serial = self.order.proposal.serial
        for name in NAMES:
            await self.say(name, answer=Answer(serial=serial, confirmed=confirmed or name != "c"))
        await self.until(
            lambda: (
                self.order.proposal.serial > serial or self.order.proposal.state is not ProposalState.PROPOSED
            )
        )


@contextlib.asynccontextmanager
async def leading(folder: Path) -> AsyncIterator[Led]:
    async with asyncio.timeout(DEADLINE), MemoryStore() as store:
        report = Report(name="leader", life=new_life(), host="leader", pid=1, address="h", port=1)
        joining = Joining(store, report, 20.0)
        joining.start()
        await until(joining, lambda: joining.has_joined)
        assert await joining.campaign()
        folded, console = Replay(folder / "journal"), Console(quiet=True)
        folded.advance()
        ledger = Ledger(Journal(folder / "journal" / "leader.jsonl"), folded)
        led = Led(folder, store, joining, ledger, console)
        try:
            await led.begin()
            yield led
        finally:
            await led.lead.close()
            await joining.close()
            console.close()
            ledger.close()


def run(folder: Path, test: Callable[[Led], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        async with leading(folder) as led:
            await test(led)

    asyncio.run(main())


def test_a_save_is_agreed_when_all_confirm_and_proposed_again_when_one_does_not(tmp_path: Path) -> None:
    async def test(led: Led) -> None:
        led.lead.want(ProposalFlag.CHECKPOINT)
        await led.answer(confirmed=False)
        await led.course("c", first=7, last=7)  # it had passed the step
        await led.until(lambda: led.order.proposal.step > 7)
        await led.answer(confirmed=True)
        assert led.order.proposal.state is ProposalState.COMMITTED
        assert led.order.proposal.purpose is ProposalFlag.CHECKPOINT

    run(tmp_path, test)


def test_a_save_is_whole_once_every_node_has_told_of_the_same(tmp_path: Path) -> None:
    async def test(led: Led) -> None:
        def saved(step: int, slot: int = 0, reason: str | None = None) -> Saved:
            return Saved(attempt=0, step=step, slot=slot, reason=reason)

        await led.course("a", saved=saved(10))
        await led.course("b", saved=saved(10))
        await led.course("c", saved=saved(9))  # an older one: it had not come to this yet
        await led.course("c", saved=saved(10))
        await led.until(lambda: led.whole == [10])
        for name, reason in (("a", None), ("b", "torn"), ("c", None)):
            await led.course(name, saved=saved(20, reason=reason))
        for name in NAMES:
            await led.course(name, saved=saved(30, slot=1))
        await led.until(lambda: len(led.whole) > 1)
        assert led.whole == [10, 30]

    run(tmp_path, test)


def test_a_slot_is_offered_when_all_have_it_and_another_chosen_when_one_cannot(tmp_path: Path) -> None:
    async def test(led: Led) -> None:
        await led.until(lambda: led.order.slot is not None)
        first = led.order.slot
        assert first is not None
        for name, sign in (("a", 1), ("b", -1), ("c", 1)):
            await led.say(name, prepared=sign * first.serial)
        await led.until(lambda: led.order.slot is not None and led.order.slot.serial > first.serial)
        second = led.order.slot
        assert second is not None
        assert second.index != first.index
        for name in NAMES:
            assert led.order.slot == second, "not before all have"
            await led.say(name, prepared=second.serial)
        await led.until(lambda: led.order.slot == replace(second, offered=True))

    run(tmp_path, test)


def test_the_end_on_one_node_ends_all(tmp_path: Path) -> None:
    async def test(led: Led) -> None:
        await led.course("b", ending=True)
        await led.until(led.attempt.ended.is_set)
        assert led.attempt.called_off
        for name in NAMES:
            await led.course(name, ended=Ended())
        departed = await led.lead.collect(0, wait=False)
        assert [one.ended for one in departed] == [Ended(), Ended(), Ended()]
        assert led.lead.order.over == 0

    run(tmp_path, test)


def test_the_own_time_of_all_ranks_is_known(tmp_path: Path) -> None:
    async def test(led: Led) -> None:
        await led.course("a", shares=(20, 30))
        await led.course("c", shares=(-1, 90))
        await led.until(lambda: led.lead.own_shares == {0: 0.2, 1: 0.3, 5: 0.9})
        assert led.lead.nodes == NAMES
        await led.course("c", shares=(-1, 90), attempt=7)  # another attempt's
        await led.until(lambda: led.lead.own_shares == {0: 0.2, 1: 0.3})

    run(tmp_path, test)


def test_a_node_that_is_gone_ends_all(tmp_path: Path) -> None:
    async def test(led: Led) -> None:
        await led.store.put(NODES + "b", None)
        await led.until(led.attempt.ended.is_set)

    run(tmp_path, test)


def test_who_does_not_reach_whom_is_asked_twice(tmp_path: Path) -> None:
    async def test(led: Led) -> None:
        async def try_once(unreached: dict[str, tuple[str, ...]], before: int = 0) -> int:
            await led.until(lambda: led.order.probe > before)
            serial = led.order.probe
            for name in NAMES:
                await led.say(name, probed=serial, unreached=unreached.get(name, ()))
            return serial

        looking = asyncio.ensure_future(led.lead.probing.pairs())
        serial = await try_once({"b": ("c",), "c": ("a", "b")})
        serial = await try_once({"c": ("b",)}, serial)
        assert await looking == (("b", "c"),)
        looking = asyncio.ensure_future(led.lead.probing.pairs())
        await try_once({}, serial)
        assert await looking == ()

    run(tmp_path, test)
