"""The leader's half of finding out which nodes do not reach each other (``decide/reach``)."""

from __future__ import annotations

from typing import Final

from supervisor.decide import reach
from supervisor.decide.reach import Pair
from supervisor.orders import Orders

PATIENCE: Final = 10.0  # seconds for all to have tried


class Probing:
    """Of one leader."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    async def pairs(self) -> tuple[Pair, ...]:
        """Have the nodes of the newest attempt try to reach each other, twice; those that did not. Raises LeadershipLostError."""
        found = await self._tried()
        if not found:
            return ()
        again = await self._tried()
        return tuple(pair for pair in found if pair in again)

    async def _tried(self) -> tuple[Pair, ...]:
        run = self._orders.order.run
        if run is None:
            return ()
        serial = self._orders.next_serial()
        self._orders.change(probe=serial)
        reports = [self._orders.report(member) for member in run.members]

        def all_have() -> bool:
            nonlocal reports
            reports = [self._orders.report(member) for member in run.members]
            return all(report is None or report.probed == serial for report in reports)

        await self._orders.until(all_have, PATIENCE)
        told = {one.name: one.unreached for one in reports if one is not None and one.probed == serial}
        return reach.pairs_of(told, run.names)
