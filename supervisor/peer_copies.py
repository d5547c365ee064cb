"""Snapshots in the RAM of other nodes: so that a node that is lost takes no step with it.

Each node keeps a copy of the part of the node before it (*buddy*), fetched when a snapshot has become whole. Two folders take turns, so that the
copy before stays whole while the next one comes in. What lies on a node, its own parts and copies, is shown to the others (``edge.peers``)
and told in its report (``Held``): so the leader knows from which parts, on which nodes, the newest state can be put together. Then a node that
takes the place of a lost one fetches that one's part; and where an attempt has another number of nodes, each fetches all parts and puts
the whole together, for the ranks to load what they need of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import tenacity

from supervisor import background
from supervisor.checkpoint import slots
from supervisor.checkpoint.directory import SLOT_NAME
from supervisor.checkpoint.manifest import METADATA_NAME, Key
from supervisor.checkpoint.shelf import SlotShelf
from supervisor.edge import arenas, clock
from supervisor.edge.files import Pace
from supervisor.edge.peers import client
from supervisor.edge.peers.protocol import Listing, Peer
from supervisor.edge.peers.server import PeerServer
from supervisor.edge.threads import in_thread
from supervisor.errors import CheckpointError, EverstepError, PeerError, SnapshotGoneError, StorageError
from supervisor.fleet import CopyOrder, Held, Holder
from supervisor.shared_snapshots import Age, SharedSnapshots
from supervisor.snapshots import age_of

FOLDERS: Final = ("copies/0", "copies/1")
ASSEMBLED: Final = "assembled"
PATIENCE: Final = 3600.0  # seconds for one file; a stalled transfer is noticed far earlier
AT_ONCE: Final = 4  # files
TRIES: Final = 8  # to copy one snapshot, for some minutes
FIRST_PAUSE: Final = 2.0  # seconds between them, doubled each time


class PeerCopies:
    """Of one node. ``told`` is called when it has something new to report."""

    def __init__(
        self,
        runtime: Path,
        secret: bytes,
        key: Key | None,
        snapshots: SharedSnapshots,
        *,
        address: str,
        bandwidth: float | None,
        say: Callable[[str], None],
    ) -> None:
        self._runtime, self._secret, self._key, self._snapshots = runtime, secret, key, snapshots
        self._address, self._say = address, say
        self._pace = None if bandwidth is None else Pace(bandwidth)
        self._folders = [runtime / name for name in FOLDERS]
        self._assembled = runtime / ASSEMBLED
        shelf = SlotShelf(
            [*(snapshots.folder(slot) for slot in snapshots.slots), *self._folders, self._assembled], key
        )
        self._server = PeerServer(shelf, secret, say)
        self.port = 0
        self.told: Callable[[], None] = lambda: None
        #: the serial of the newest copy that is here; negative: it could not be had
        self.copied = 0
        #: the serial of the newest copy that was begun
        self.begun = 0
        self._work: asyncio.Task[None] | None = None
        self._failing_said = False
        self._held: dict[Path, slots.SlotRecord] = {}
        for folder in (*self._folders, self._assembled):
            with contextlib.suppress(EverstepError):
                if (record := slots.read_slot(folder, key)) is not None:
                    self._held[folder] = record

    async def start(self) -> None:
        """Show the others what is here. Raises PeerError."""
        self.port = await self._server.open(self._address)
        self.told()

    async def close(self) -> None:
        """Show and fetch no more."""
        await self._stop()
        await self._server.close()

    @property
    def held(self) -> tuple[Held, ...]:
        """The copies, as they are reported."""
        return tuple(
            Held(
                attempt=record.attempt, step=record.step, slot=-1, node_rank=record.node_rank, nodes=record.nodes,
                world_size=record.world_size,
            )
            for record in self._held.values()
        )  # fmt: skip

    # ------------------------------------------------------------------ the buddy's part

    def heed(self, order: CopyOrder, buddy: Holder) -> None:
        """Have a copy of the buddy's part, if that is not under way."""
        if order.serial <= self.begun:
            return
        self.begun = order.serial
        if self._work is not None:
            self._work.cancel()
        self._work = background.start(self._copy(order, buddy, self._work))

    async def _copy(self, order: CopyOrder, buddy: Holder, before: asyncio.Task[None] | None) -> None:
        """A try that failed is reported at once, and made again for as long as the buddy has that snapshot and no other is ordered."""
        if before is not None:
            await asyncio.wait({before})
        age = (order.attempt, order.step)
        folder = min(
            self._folders, key=lambda one: age_of(self._held[one]) if one in self._held else (-1, -1)
        )
        self._held.pop(folder, None)

        @tenacity.retry(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential(multiplier=FIRST_PAUSE, max=60.0),
            stop=tenacity.stop_after_attempt(TRIES),
            reraise=True,
        )
        async def bring() -> slots.SlotRecord:
            try:
                return await self._bring(buddy, age, (buddy.rank, buddy.nodes), folder)
            except (EverstepError, OSError) as error:
                self._failed(order, buddy, error)
                raise

        try:
            record = await bring()
        except (EverstepError, OSError):
            return
        if self._failing_said:
            self._say(f"node {buddy.name}'s snapshots are copied again")
            self._failing_said = False
        self._held[folder] = record
        self.copied = order.serial
        self.told()

    def _failed(self, order: CopyOrder, buddy: Holder, error: Exception) -> None:
        self.copied = -order.serial
        self.told()
        if not self._failing_said and not isinstance(error, SnapshotGoneError):  # a newer one follows
            self._failing_said = True
            self._say(f"no copy of node {buddy.name}'s snapshots: {error}")

    async def _stop(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait({self._work})

    async def reaches(self, holder: Holder, patience: float) -> bool:
        """Whether that node's host answers."""
        return await client.is_reached(self._peer(holder), patience)

    def _peer(self, holder: Holder) -> Peer:
        return Peer(name=holder.name, host=holder.address, port=holder.port, secret=self._secret)

    # ------------------------------------------------------------------ what an attempt resumes from

    async def bring_part(self, age: Age, rank: int, nodes: int, holders: Sequence[Holder], slot: int) -> Path:
        """Have the part of node ``rank`` in a slot of this node. Raises PeerError, StorageError, CheckpointError."""
        await self._stop()
        held = self._snapshots.find(age, (rank, nodes))
        if held is not None:
            self._snapshots.move_slot(held, slot)
            self._snapshots.forget_others(slot)
            return self._snapshots.folder(slot)
        folder = self._snapshots.folder(slot)
        self._snapshots.vacate(slot)
        own = next(
            (one for one, record in self._held.items() if _part_of(record) == (age, rank, nodes)), None
        )
        if own is not None:  # as the buddy of the node whose place it takes now
            await in_thread(lambda: _exchange(own, folder))
            del self._held[own]
        else:
            await self._bring(_holder_of(holders, rank), age, (rank, nodes), folder)
        self._snapshots.adopt(slot)
        self._snapshots.forget_others(slot)
        return folder

    async def assemble(self, age: Age, holders: Sequence[Holder]) -> slots.SlotRecord:
        """Put the whole together from all parts; it lies in ``assembled``. Raises PeerError, StorageError, CheckpointError."""
        await self._stop()
        self.clear()
        try:
            first: slots.SlotRecord | None = None
            for holder in sorted(holders, key=lambda one: one.rank):
                record = await self._bring(
                    holder, age, (holder.rank, holder.nodes), self._assembled, whole=True
                )
                first = first or record
            assert first is not None
            whole = slots.SlotRecord(
                step=first.step, attempt=first.attempt, world_size=first.world_size, created=clock.now(),
                run_id=first.run_id, metrics=first.metrics,
            )  # fmt: skip
            record = slots.write_slot(self._assembled, whole, self._key)
        except BaseException:
            self.clear()
            raise
        self._held[self._assembled] = record
        self.told()
        return record

    @property
    def assembled(self) -> Path:
        """Where a whole that was put together lies."""
        return self._assembled

    def clear(self) -> None:
        """What was put together is not wanted any more; ranks that have mapped it keep it."""
        self._held.pop(self._assembled, None)
        shutil.rmtree(self._assembled, ignore_errors=True)

    # ------------------------------------------------------------------ fetching

    async def _bring(
        self, holder: Holder, age: Age, part: tuple[int, int], folder: Path, *, whole: bool = False
    ) -> slots.SlotRecord:
        """A part's files, and last its ``slot.json``; for a ``whole``, only what belongs into one, without that."""
        peer = self._peer(holder)
        listing = await client.listing(peer, *age, part)
        names = [name for name in listing.files if not whole or _belongs(name, part[0])]
        self._make_room(folder, sum(listing.files[name] for name in names))
        if not whole:
            await in_thread(lambda: _clear_for(folder, names))
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> None:
            async with turn:
                await client.fetch(
                    peer, listing, name, folder / name, patience=PATIENCE, pace=self._pace, warm=folder / name
                )

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_caught(one(name))) for name in names]
        if (error := next((task.result() for task in tasks if task.result() is not None), None)) is not None:
            raise error
        if whole:
            return slots.parse_slot(listing.record.encode(), self._key)
        await in_thread(lambda: _seal(folder, listing))
        record = slots.read_slot(folder, self._key)
        if record is None:
            raise CheckpointError(f"what {peer} gave is no snapshot")
        return record

    def _make_room(self, folder: Path, size: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        short = arenas.lacking(folder, size)
        if short is not None:
            raise StorageError(
                f"memory has no room for {size / 1e9:.2f} GB ({short[0] / 1e9:.2f} GB more are needed)"
            )


def _may_pass(error: BaseException) -> bool:
    """Whether another try may find that gone."""
    return isinstance(error, PeerError | StorageError) and not isinstance(error, SnapshotGoneError)


async def _caught(work: object) -> EverstepError | None:
    try:
        await work  # type: ignore[misc]
    except EverstepError as error:
        return error
    return None


def _holder_of(holders: Sequence[Holder], rank: int) -> Holder:
    for holder in holders:
        if holder.rank == rank:
            return holder
    raise PeerError(f"no node holds the part of node {rank}")


def _part_of(record: slots.SlotRecord) -> tuple[Age, int, int]:
    return age_of(record), record.node_rank, record.nodes


def _belongs(name: str, rank: int) -> bool:
    """Whether a file of a node's part is one of the whole."""
    return not slots.is_copy_file(name) and (name != METADATA_NAME or rank == 0)


def _clear_for(folder: Path, names: Sequence[str]) -> None:
    """No snapshot any more; files of the same name stay, for their pages."""
    slots.invalidate(folder)
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _seal(folder: Path, listing: Listing) -> None:
    partial = folder / f"{SLOT_NAME}.partial"
    partial.write_text(listing.record)
    partial.rename(folder / SLOT_NAME)


def _exchange(one: Path, other: Path) -> None:
    """The two folders change places."""
    spare = one.with_name(f"{one.name}.moving")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
