"""The leader's half of saves on several nodes: which step, into which slot, and when it is whole (``decide/agreement``).

What a node has told is looked at once. There may be thousands of them, and each tells something several times in a save.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from supervisor.decide import agreement as agreements
from supervisor.decide.agreement import Agreement, Standing
from supervisor.edge import clock
from supervisor.fleet import Course, Member, Proposal, Saved, SlotOrder
from supervisor.ledger import Ledger
from supervisor.model import ProposalFlag, SnapshotCompleted
from supervisor.orders import Orders
from supervisor.shared_snapshots import SharedSnapshots

Place = tuple[int, int]  # a save's step and slot


class Rounds:
    """Of one leader. ``begin`` with each attempt, ``think`` with all news of it."""

    def __init__(self, orders: Orders, ledger: Ledger, snapshots: SharedSnapshots, before: Proposal) -> None:
        self._orders, self._ledger, self._snapshots = orders, ledger, snapshots
        self._agreement = Agreement(attempt=-1, proposal=before)
        self._standings: dict[Member, Standing] = {}
        self._saves: dict[Member, Saved] = {}  # the newest that each has told of
        self._places: Counter[Place] = Counter()  # of those
        #: saves of this attempt that are whole or have failed, by step and slot
        self._settled: set[Place] = set()
        self._slot_done = True
        self._failed_slot: int | None = None
        self._refused = 0  # the serial of a slot that some node cannot make ready
        self._requests: dict[str, int] = {}
        self.rate: float | None = None  # steps a second
        self.on_saved: Callable[[int, ProposalFlag], None] = lambda _step, _flags: None

    def begin(self, attempt: int, members: Sequence[Member]) -> None:
        """Another attempt."""
        self._agreement = Agreement(attempt=attempt, proposal=self._agreement.proposal)
        self._standings = {member: Standing() for member in members}
        self._saves.clear()
        self._places.clear()
        self._settled.clear()
        self._requests.clear()
        self._slot_done, self._failed_slot = True, None

    def think(self, news: Mapping[Member, Course | None]) -> None:
        """Look at what nodes of the attempt have told."""
        for member, course in news.items():
            self._heed_save(member, course.saved if course is not None else None)
            self._heed_standing(member, course)
        self._agree()
        self._choose_slot(news)

    def want(self, flags: ProposalFlag) -> None:
        """Have all ranks save soon, at one step."""
        self._agreement = agreements.want(self._agreement, flags)

    def recall_stop(self) -> bool:
        """Nobody wants a stop any more: whether no rank has heard of it yet."""
        recalled = agreements.recall_stop(self._agreement)
        if recalled is None:
            return False
        self._agreement = recalled
        return True

    @property
    def is_idle(self) -> bool:
        """Whether no save is wanted or under way."""
        return self._agreement.is_idle

    # ------------------------------------------------------------------ which step

    def _heed_standing(self, member: Member, course: Course | None) -> None:
        report = self._orders.report(member)
        if course is None or report is None or course.ended is not None:
            self._standings[member] = Standing()
            return
        if course.request is not None and self._requests.get(member.name) != course.request:
            self._requests[member.name] = course.request
            self._agreement = agreements.request(self._agreement, course.request)
        self._standings[member] = Standing(
            in_session=course.in_session,
            first=course.first,
            last=course.last,
            total_steps=course.total_steps,
            answer=report.answer,
        )

    def _agree(self) -> None:
        agreement = self._agreement
        if not agreement.is_idle or agreement.is_open:
            standings = list(self._standings.values())
            skips = self._ledger.record.skips
            self._agreement = agreements.look(agreement, standings, self.rate, clock.monotonic(), skips)
        if self._agreement.proposal != self._orders.order.proposal:
            self._orders.change(proposal=self._agreement.proposal)

    # ------------------------------------------------------------------ what is saved

    def _heed_save(self, member: Member, saved: Saved | None) -> None:
        before = self._saves.get(member)
        if saved == before:
            return
        if before is not None:
            self._places[before.step, before.slot] -= 1
            del self._saves[member]
        if saved is None:
            return
        self._saves[member], place = saved, (saved.step, saved.slot)
        self._places[place] += 1
        if place in self._settled:
            return
        if saved.reason is not None:
            self._settled.add(place)
            self._agreement = agreements.failed(self._agreement, saved.step)
            self._snapshots.failure = f"the snapshot of step {saved.step} failed: {saved.reason}"
            self._slot_done, self._failed_slot = True, saved.slot if saved.slot >= 0 else self._failed_slot
        elif self._places[place] == len(self._standings):
            self._settled.add(place)
            self._whole(saved.step)

    def _whole(self, step: int) -> None:
        self._slot_done, self._failed_slot = True, None
        saves = self._saves.values()
        self._snapshots.tell_whole(
            SnapshotCompleted(
                time=clock.now(),
                attempt=self._agreement.attempt,
                step=step,
                seconds=max(saved.seconds for saved in saves),
                bytes=sum(saved.bytes for saved in saves),
            )
        )
        self._agreement, flags = agreements.served(self._agreement, step)
        self.on_saved(step, flags)

    # ------------------------------------------------------------------ where

    def _choose_slot(self, news: Mapping[Member, Course | None]) -> None:
        slot = self._orders.order.slot
        if slot is None and not all(standing.in_session for standing in self._standings.values()):
            return  # what lies in it may be what some node resumes from
        reports = [self._orders.report(member) for member in news]
        if slot is not None and any(one is not None and one.prepared == -slot.serial for one in reports):
            self._refused = slot.serial
        refused = slot is not None and self._refused == slot.serial
        if slot is None or self._slot_done or refused:
            index = self._snapshots.next_slot(
                slot.index if slot is not None and refused else None, self._failed_slot
            )
            if index is not None:
                self._slot_done = False
                self._orders.change(slot=SlotOrder(serial=self._orders.next_serial(), index=index))
        elif not slot.offered and all(
            (report := self._orders.report(member)) is not None and report.prepared == slot.serial
            for member in self._standings
        ):
            self._orders.change(slot=replace(slot, offered=True))
