"""The leader's half of saves on several nodes: which step, into which slot, and when it is whole (``decide/agreement``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from supervisor.decide import agreement as agreements
from supervisor.decide.agreement import Agreement, Standing
from supervisor.edge import clock
from supervisor.fleet import Course, Member, Proposal, SlotOrder
from supervisor.ledger import Ledger
from supervisor.model import ProposalFlag, SnapshotCompleted
from supervisor.orders import Orders
from supervisor.shared_snapshots import SharedSnapshots


class Rounds:
    """Of one leader. ``begin`` with each attempt, ``think`` with all news of it."""

    def __init__(self, orders: Orders, ledger: Ledger, snapshots: SharedSnapshots, before: Proposal) -> None:
        self._orders, self._ledger, self._snapshots = orders, ledger, snapshots
        self._agreement = Agreement(attempt=-1, proposal=before)
        #: saves of this attempt that are whole or have failed, by step and slot
        self._settled: set[tuple[int, int]] = set()
        self._slot_done = True
        self._failed_slot: int | None = None
        self._requests: dict[str, int] = {}
        self.rate: float | None = None  # steps a second
        self.on_saved: Callable[[int, ProposalFlag], None] = lambda _step, _flags: None

    def begin(self, attempt: int) -> None:
        """Another attempt."""
        self._agreement = Agreement(attempt=attempt, proposal=self._agreement.proposal)
        self._settled.clear()
        self._requests.clear()
        self._slot_done, self._failed_slot = True, None

    def think(self, courses: Mapping[Member, Course | None]) -> None:
        """Look at what the nodes of the attempt have told."""
        self._heed_saves(courses)
        self._agree(courses)
        self._choose_slot(courses)

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

    def _agree(self, courses: Mapping[Member, Course | None]) -> None:
        standings = []
        for member, course in courses.items():
            report = self._orders.report(member)
            if course is None or report is None or course.ended is not None:
                standings.append(Standing())
                continue
            if course.request is not None and self._requests.get(member.name) != course.request:
                self._requests[member.name] = course.request
                self._agreement = agreements.request(self._agreement, course.request)
            standings.append(
                Standing(
                    in_session=course.in_session,
                    first=course.first,
                    last=course.last,
                    total_steps=course.total_steps,
                    answer=report.answer,
                )
            )
        now = clock.monotonic()
        self._agreement = agreements.look(
            self._agreement, standings, self.rate, now, self._ledger.record.skips
        )
        if self._agreement.proposal != self._orders.order.proposal:
            self._orders.change(proposal=self._agreement.proposal)

    def _heed_saves(self, courses: Mapping[Member, Course | None]) -> None:
        saves = [
            course.saved for course in courses.values() if course is not None and course.saved is not None
        ]
        for saved in saves:
            if saved.reason is not None and (saved.step, saved.slot) not in self._settled:
                self._settled.add((saved.step, saved.slot))
                self._agreement = agreements.failed(self._agreement, saved.step)
                self._snapshots.failure = f"the snapshot of step {saved.step} failed: {saved.reason}"
                self._slot_done, self._failed_slot = (
                    True,
                    saved.slot if saved.slot >= 0 else self._failed_slot,
                )
        places = {(saved.step, saved.slot) for saved in saves}
        if len(saves) < len(courses) or len(places) != 1 or places <= self._settled:
            return
        if any(saved.reason is not None for saved in saves):
            return
        self._settled |= places
        step = saves[0].step
        self._slot_done, self._failed_slot = True, None
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

    def _choose_slot(self, courses: Mapping[Member, Course | None]) -> None:
        slot = self._orders.order.slot
        if slot is None and not all(course is not None and course.in_session for course in courses.values()):
            return  # what lies in it may be what some node resumes from
        reports = [self._orders.report(member) for member in courses]
        refused = slot is not None and any(
            report is not None and report.prepared == -slot.serial for report in reports
        )
        if slot is None or self._slot_done or refused:
            index = self._snapshots.next_slot(
                slot.index if slot is not None and refused else self._failed_slot
            )
            if index is not None:
                self._slot_done = False
                self._orders.change(slot=SlotOrder(serial=self._orders.next_serial(), index=index))
        elif not slot.offered and all(
            report is not None and report.prepared == slot.serial for report in reports
        ):
            self._orders.change(slot=replace(slot, offered=True))
