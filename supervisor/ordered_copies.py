"""The leader's half of snapshots in other nodes' memory (``peer_copies``): what is copied, and what can be put together of it."""

from __future__ import annotations

from supervisor.decide import rollback
from supervisor.fleet import Assignment, CopyOrder, Holder
from supervisor.ledger import Ledger
from supervisor.orders import Orders
from supervisor.roster import Roster
from supervisor.shared_snapshots import Age, SharedSnapshots


class Copying:
    """Of one leader. ``begin`` with each attempt, ``think`` with all news of it."""

    def __init__(
        self, orders: Orders, roster: Roster, ledger: Ledger, snapshots: SharedSnapshots, *, enabled: bool
    ) -> None:
        self._orders, self._roster, self._ledger, self._snapshots = orders, roster, ledger, snapshots
        self._enabled = enabled
        self._copied: Age | None = None  # what was last to be copied

    def begin(self) -> None:
        """Another attempt."""
        self._snapshots.copying, self._copied = None, None

    def think(self) -> None:
        """Order the next copies when those before are made."""
        members, order = self._roster.members, self._orders.order.copy
        newest = self._snapshots.newest_part(len(members))
        under_way = order is not None and self._snapshots.copying is not None
        if not under_way and (newest is None or (self._copied is not None and newest <= self._copied)):
            return
        reports = [self._orders.report(member) for member in members]
        if order is not None and any(
            report is not None and abs(report.copied) != order.serial for report in reports
        ):
            return
        self._snapshots.copying = None
        if not self._enabled or len(members) < 2 or newest is None or None in reports:
            return
        if self._copied is not None and newest <= self._copied:
            return
        self._copied = self._snapshots.copying = newest
        serial = self._orders.next_serial()
        self._orders.change(copy=CopyOrder(serial=serial, attempt=newest[0], step=newest[1]))

    def best_state(self, assignment: Assignment) -> tuple[Age, tuple[Holder, ...]] | None:
        """The newest snapshot of which every part is on some node, and on which; rather one of as many nodes as there are.

        Of two that have a part it is a node of the attempt, which the others reach.
        """
        found: dict[tuple[Age, int], dict[int, Holder]] = {}
        apart, names = self._roster.apart, set(assignment.names)
        reports = [report for report in self._orders.reports.values() if report.name not in apart]
        for report in sorted(reports, key=lambda one: one.name in names):
            for held in sorted(report.held, key=lambda one: one.slot):
                age = (held.attempt, held.step)
                if report.shown and not rollback.is_condemned(self._ledger.record, *age):
                    holder = Holder(
                        name=report.name,
                        address=report.address,
                        port=report.shown,
                        rank=held.node_rank,
                        nodes=held.nodes,
                    )
                    found.setdefault((age, held.nodes), {})[held.node_rank] = holder
        whole = [key for key, parts in found.items() if len(parts) == key[1]]
        if not whole:
            return None
        best = max(whole, key=lambda key: (key[0], key[1] == len(assignment.members)))
        return best[0], tuple(holder for _, holder in sorted(found[best].items()))
