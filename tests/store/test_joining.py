"""Nodes that join through a real tcp store: leases, reports, orders, and one leader at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from supervisor.edge import clock
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.server import Server
from supervisor.edge.store.tcp import TcpStore
from supervisor.errors import StoreError
from supervisor.fleet import Assignment, Member, Order, Origin, Report
from supervisor.joining import Joining, Roll, new_life, until

SECRET = b"the secret"
HOST = "127.0.0.1"
DEADLINE = 60.0
LEASE = 2.0


def report(name: str) -> Report:
    return Report(name=name, life=new_life(), host=name, pid=1, address=HOST, port=1)


def order(serial: int, leader: str) -> Order:
    return Order(serial=serial, leader=leader, epoch=1, run_id="run")


class Lab:
    """A store that can be taken away, and nodes."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.server = Server(self.store, SECRET)
        self.port = 0

    async def up(self) -> None:
        self.server = Server(self.store, SECRET)
        self.port = await self.server.open(HOST, self.port)

    async def down(self) -> None:
        await self.server.close()

    @contextlib.asynccontextmanager
    async def node(self, name: str) -> AsyncIterator[Joining]:
        client = TcpStore(HOST, self.port, SECRET, answer=5.0)
        node = Joining(client, report(name), LEASE)
        node.start()
        try:
            yield node
        finally:
            await node.close()
            await client.close()


@contextlib.asynccontextmanager
async def lab() -> AsyncIterator[Lab]:
    one = Lab()
    async with asyncio.timeout(DEADLINE), one.store:
        await one.up()
        try:
            yield one
        finally:
            await one.down()


async def joined(node: Joining) -> None:
    assert await until(node, lambda: node.has_joined, clock.monotonic() + DEADLINE)


async def until_roll(roll: Roll, names: set[str]) -> None:
    while set(roll.reports) != names:
        await roll.look(5.0)


def test_one_leads_and_all_see_what_it_orders() -> None:
    async def main() -> None:
        async with lab() as one, one.node("a") as a, one.node("b") as b:
            await joined(a)
            await joined(b)
            won = await asyncio.gather(a.campaign(), b.campaign())
            assert sorted(won) == [False, True]
            leader, other = (a, b) if won[0] else (b, a)
            assert await leader.command(order(1, leader.report.name))
            with pytest.raises(StoreError):
                await other.command(order(2, other.report.name))  # it does not lead
            assert await until(other, lambda: other.order is not None and other.order.serial == 1)
            roll = Roll(one.store)
            await until_roll(roll, {"a", "b"})
            a.tell(replace(a.report, seen=1))
            while roll.reports["a"].seen != 1:
                await roll.look(5.0)

    asyncio.run(main())


def test_a_node_that_is_gone_is_missed_and_its_leadership_is_free() -> None:
    async def main() -> None:
        async with lab() as one, one.node("b") as b:
            silent = Joining(one.store, report("a"), LEASE)
            silent.start()
            await joined(silent)
            assert await silent.campaign()
            assert await silent.command(order(1, "a"))
            for task in silent._tasks:  # cut off: it can say nothing any more
                task.cancel()
            await joined(b)
            roll = Roll(one.store)
            await until_roll(roll, {"b"})
            assert await until(b, lambda: b.leader is None and b.order is not None)
            assert not silent.leads, "by its own clock it knows before the store lets anybody else lead"
            assert await b.campaign()
            assert b.order is not None
            assert b.order.serial == 1, "it goes on with the order that there is"
            assert await b.command(order(2, "b"))
            with pytest.raises(StoreError):
                await silent.command(order(2, "a"))

    asyncio.run(main())


def test_a_leader_that_gives_up_is_followed_at_once() -> None:
    async def main() -> None:
        async with lab() as one, one.node("a") as a, one.node("b") as b:
            await joined(a)
            await joined(b)
            assert await a.campaign()
            assert await until(b, lambda: b.leader == a.own)
            await a.resign()
            assert not a.leads
            assert await until(b, lambda: b.leader is None)
            assert a.has_joined, "its lease holds: nobody had to wait for that"
            assert await b.campaign()
            assert await until(a, lambda: a.leader == b.own)
            await a.resign()  # it does not lead: the other one still does
            a.leader = a.own  # as one that has not heard of it yet
            await a.resign()
            assert one.store.table.read("job/").entries["job/leader"].value == b.own

    asyncio.run(main())


def test_an_old_leader_cannot_write_over_the_order_of_the_next_even_if_it_believes_in_itself() -> None:
    async def main() -> None:
        async with lab() as one, one.node("a") as a, one.node("b") as b:
            await joined(a)
            await joined(b)
            assert await a.campaign()
            assert await a.command(order(1, "a"))
            seen = a.revision
            assert await until(b, lambda: b.revision == seen)
            await one.store.put("job/leader", None)
            assert await until(b, lambda: b.leader is None)
            assert await b.campaign()
            assert await b.command(order(2, "b"))
            a.leader, a._papers.revision = f"a {a.report.life}", seen  # as one that has not heard of it
            assert a.leads
            assert not await a.command(order(3, "a"))

    asyncio.run(main())


def test_a_store_that_is_away_is_borne_and_who_comes_back_late_is_somebody_else() -> None:
    async def main() -> None:
        async with lab() as one, one.node("a") as a:
            await joined(a)
            life = a.report.life
            await one.down()
            assert await until(a, lambda: a.problem is not None, clock.monotonic() + DEADLINE) or a.problem
            while "node/a" in one.store.table.read("node/").entries:
                await one.store.changes("node/", one.store.table.revision, 1.0)
            assert not a.has_joined
            assert a.silent > 0
            await one.up()
            assert await until(a, lambda: a.has_joined, clock.monotonic() + DEADLINE)
            assert a.report.life != life

    asyncio.run(main())


def assignment(attempt: int, count: int) -> Assignment:
    members = tuple(Member(name=f"n{number}", life=new_life()) for number in range(count))
    return Assignment(attempt=attempt, members=members, address=HOST, port=1)


@pytest.mark.parametrize("nodes", [2, 2000])
def test_what_is_the_same_for_long_is_sent_once_and_who_comes_late_sees_all_of_it(nodes: int) -> None:
    async def main() -> None:
        async with lab() as one, one.node("a") as a, one.node("b") as b:
            await joined(a)
            await joined(b)
            assert await a.campaign()
            run, standby = assignment(1, nodes), assignment(2, nodes)
            orders = [
                replace(order(1, a.own), run=run),
                replace(order(2, a.own), run=run, standby=standby),
                replace(order(3, a.own), run=standby, origin=Origin(attempt=2, step=7)),
                order(4, a.own),
            ]
            for number, given in enumerate(orders, 1):
                assert await a.command(given)
                assert await until(b, lambda number=number: b.order is not None and b.order.serial == number)  # type: ignore[misc]
                assert b.order == given
                async with one.node("late") as late:
                    assert await until(late, lambda: late.order is not None)
                    assert late.order == given
            there = one.store.table.read("job/").entries
            assert len(there["job/order"].value) < 200
            written = there["job/run"].revision
            assert await a.command(replace(orders[2], serial=5))
            assert one.store.table.read("job/").entries["job/run"].revision == written

    asyncio.run(main())


def test_the_next_leader_is_not_written_over_in_part() -> None:
    async def main() -> None:
        async with lab() as one, one.node("a") as a, one.node("b") as b:
            await joined(a)
            await joined(b)
            assert await a.campaign()
            assert await a.command(replace(order(1, a.own), run=assignment(1, 2)))
            assert await until(b, lambda: b.order is not None)
            for task in a._tasks:  # it hears nothing more
                task.cancel()
            own = f"b {b.report.life}"
            await one.store.put("job/leader", own)
            assert await until(b, lambda: b.leader == own)
            given = replace(order(2, own), run=assignment(2, 2))
            assert await b.command(given)
            assert not await a.command(replace(order(3, a.own), run=assignment(3, 2)))
            assert b.order == given
            async with one.node("late") as late:
                assert await until(late, lambda: late.order is not None)
                assert late.order == given

    asyncio.run(main())


@pytest.mark.parametrize("text", ["{", "[]", '{"serial": "x"}', "null"])
def test_an_order_that_cannot_be_read_is_none(text: str) -> None:
    async def main() -> None:
        async with lab() as one, one.node("a") as a:
            await joined(a)
            assert await a.campaign()
            assert await a.command(order(1, "a"))
            await one.store.put("job/order", text)
            await one.store.put("job/order", None)
            await one.store.put("job/leader", None)
            assert await until(a, lambda: a.leader is None, clock.monotonic() + DEADLINE)
            assert a.order is not None
            assert a.order.serial == 1

    asyncio.run(main())
