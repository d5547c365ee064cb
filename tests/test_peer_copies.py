"""Copies of other nodes' snapshots, over real connections: the buddy's part, a lost node's place, a whole of all parts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisor.checkpoint import slots
from supervisor.errors import PeerError
from supervisor.fleet import CopyOrder, Holder
from supervisor.model import Fact
from supervisor.peer_copies import PeerCopies
from supervisor.shared_snapshots import SharedSnapshots
from supervisor.snapshots import Ranks

SECRET = b"the secret of the job"
AGE = (0, 5)


class Node:
    def __init__(self, folder: Path, rank: int, nodes: int = 2) -> None:
        for slot in range(3):
            (folder / "slots" / str(slot)).mkdir(parents=True)
        facts: list[Fact] = []
        self.rank, self.nodes = rank, nodes
        self.snapshots = SharedSnapshots(folder, run_id="run", key=None, fact=facts.append)
        self.said: list[str] = []
        self.told = asyncio.Event()
        self.copies = PeerCopies(
            folder, SECRET, None, self.snapshots, address="127.0.0.1", bandwidth=None, say=self.said.append
        )
        self.copies.told = self.told.set

    def save(self, step: int = 5, slot: int = 0) -> None:
        assert self.snapshots.prepare(slot)
        folder = self.snapshots.folder(slot)
        for name in (".metadata", f"__{self.rank}_0.distcp", f"__{self.rank}_2.distcp"):
            (folder / name).write_text(f"{name} of node {self.rank}, step {step}")
        ranks = Ranks(0, here=1, world_size=self.nodes, nodes=self.nodes, node_rank=self.rank)
        assert self.snapshots.part(self.rank, ranks, step=step, slot=slot, seconds=0.0, size=1, metrics={})

    def holder(self, rank: int | None = None) -> Holder:
        return Holder(
            name=f"n{self.rank}", address="127.0.0.1", port=self.copies.port, rank=self.rank if rank is None else rank,
            nodes=self.nodes,
        )  # fmt: skip

    async def copy(self, serial: int, step: int, buddy: Holder) -> int:
        order = CopyOrder(serial=serial, attempt=0, step=step)
        self.told.clear()
        self.copies.heed(order, buddy)
        async with asyncio.timeout(60):
            await self.told.wait()
        return self.copies.copied


@contextlib.asynccontextmanager
async def up(*nodes: Node) -> AsyncIterator[None]:
    for node in nodes:
        await node.copies.start()
    try:
        yield
    finally:
        for node in nodes:
            await node.copies.close()


def test_a_lost_nodes_place_is_taken_from_its_buddys_memory(tmp_path: Path) -> None:
    async def story() -> None:
        first, second, new = Node(tmp_path / "0", 0), Node(tmp_path / "1", 1), Node(tmp_path / "new", 1)
        async with up(first, new):
            async with up(second):
                second.save()
                assert await first.copy(1, 5, second.holder()) == 1
            assert [(held.step, held.node_rank, held.slot) for held in first.copies.held] == [(5, 1, -1)]
            folder = await new.copies.bring_part(AGE, 1, 2, [first.holder(0), first.holder(1)], slot=2)
            assert folder == new.snapshots.folder(2)
            assert (folder / "__1_2.distcp").read_text() == "__1_2.distcp of node 1, step 5"
            assert new.snapshots.find(AGE, (1, 2)) == 2
            # the buddy itself takes the place: nothing is fetched
            folder = await first.copies.bring_part(AGE, 1, 2, [], slot=0)
            assert first.snapshots.find(AGE, (1, 2)) == 0
            assert not first.copies.held

    asyncio.run(story())


def test_the_whole_is_put_together_of_all_parts(tmp_path: Path) -> None:
    async def story() -> None:
        first, second = Node(tmp_path / "0", 0), Node(tmp_path / "1", 1)
        first.save()
        second.save()
        async with up(first, second):
            record = await second.copies.assemble(AGE, [second.holder(), first.holder()])
            found = {path.name: path.read_text() for path in second.copies.assembled.iterdir()}
            assert found.pop("slot.json")
            assert sorted(found) == [".metadata", "__0_0.distcp", "__1_0.distcp"], "no copies"
            assert found[".metadata"] == ".metadata of node 0, step 5"
            assert (record.nodes, record.world_size, record.step) == (1, 2, 5)
            assert slots.read_slot(second.copies.assembled) == record
            second.copies.clear()
            assert not second.copies.assembled.exists()

    asyncio.run(story())


def test_copies_take_turns_and_a_failed_one_leaves_the_one_before(tmp_path: Path) -> None:
    async def story() -> None:
        first, second = Node(tmp_path / "0", 0), Node(tmp_path / "1", 1)
        async with up(first, second):
            for serial, step in ((1, 5), (2, 6), (3, 7)):
                second.save(step, slot=step % 3)
                assert await first.copy(serial, step, second.holder()) == serial
            assert sorted(held.step for held in first.copies.held) == [6, 7]
            assert await first.copy(4, 8, second.holder()) == -4, "there is no such snapshot"
            assert [held.step for held in first.copies.held] == [7]
            assert not first.said, "a node that has moved on is nothing to speak of"

    asyncio.run(story())


def test_a_copy_that_failed_is_tried_again_and_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.peer_copies.FIRST_PAUSE", 0.01)

    async def story() -> None:
        first, second = Node(tmp_path / "0", 0), Node(tmp_path / "1", 1)
        refused = 0

        async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal refused
            if refused < 3:
                refused += 1
                writer.transport.abort()
                return
            onward, back = await asyncio.open_connection("127.0.0.1", second.copies.port)
            await asyncio.gather(_pour(reader, back), _pour(onward, writer))

        async with up(first, second), await asyncio.start_server(link, "127.0.0.1", 0) as server:
            second.save()
            buddy = dataclasses.replace(second.holder(), port=server.sockets[0].getsockname()[1])
            assert await first.copy(1, 5, buddy) == -1
            assert not first.copies.held
            async with asyncio.timeout(60):
                while first.copies.copied != 1:
                    first.told.clear()
                    await first.told.wait()
        assert [held.step for held in first.copies.held] == [5]
        failed, again = first.said
        assert failed.startswith("no copy of node n1's snapshots: ")
        assert again == "node n1's snapshots are copied again"

    asyncio.run(story())


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
    writer.close()


def test_nobody_has_it(tmp_path: Path) -> None:
    async def story() -> None:
        node = Node(tmp_path / "0", 0)
        async with up(node):
            with pytest.raises(PeerError, match="no node holds"):
                await node.copies.bring_part(AGE, 1, 2, [], slot=0)
            with pytest.raises(PeerError):
                await node.copies.assemble(AGE, [node.holder()])
            assert not node.copies.assembled.exists()

    asyncio.run(story())
