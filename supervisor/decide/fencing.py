"""Who may still act, told from one's own clock: leases seen from the side that holds them.

The store removes what is under a lease when nothing was heard for ``seconds``, by its clock. The holder cannot see that happen when it
is cut off. But it knows when it *began* the last renewal that succeeded: the store's count began later than that. So by its own
monotonic clock the lease holds for at least ``seconds`` from there, and a holder that counts on less never acts on a lease that
has run out. Two clocks that run at different speeds are allowed for by ``DRIFT``.

What follows, for a node that is cut off:

- *It commits nothing.* Checkpoints are committed by the leader alone, under its lease and, at the last moment, the epoch in the
  job directory, which the next leader raises before it does anything else. A node that does not lead only writes files that
  count for nothing until then, in a place that belongs to one attempt.
- *It decides nothing.* Its ranks may go on: as long as they do, nobody has taken their place, for a collective needs all of them.
  When they stand still, or end, it takes them away and waits for the store; when it has waited long enough it leaves, with what it
  holds in RAM for the next run.
- *It does not come back as what it was.* With the lease its report has gone; when it returns it does under a new one, and takes the
  order as it then stands.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

DRIFT: Final = 0.05  # of a lease: two clocks, and the time between a look and the act
RENEWALS: Final = 3  # in the time of one lease


@dataclass(frozen=True, kw_only=True)
class Tenure:
    """A lease as its holder knows it. ``since``: when the last renewal that succeeded was begun, on the monotonic clock."""

    seconds: float
    since: float

    def holds(self, now: float) -> bool:
        """Whether it certainly has not run out."""
        return now < self.since + self.seconds * (1 - DRIFT)

    @property
    def pause(self) -> float:
        """Seconds between two renewals."""
        return self.seconds / RENEWALS


class Isolation(enum.Enum):
    """What a node does that does not reach the store."""

    GO_ON = "go on"
    END = "end"  # take the ranks away: they need a decision that nobody can give
    LEAVE = "leave"


def isolated(
    *, silent: float, lease: float, patience: float, moved: float | None, needs_decision: bool
) -> Isolation:
    """For a node that has not reached the store for ``silent`` seconds.

    ``moved``: seconds since its ranks last made a step; None: it has none. ``needs_decision``: they have ended, stand at a proposal, or
    must stop. ``patience``: how long a decision may be waited for.
    """
    if silent < lease:
        return Isolation.GO_ON
    if moved is None or needs_decision:
        return Isolation.LEAVE if silent > patience else Isolation.GO_ON
    if moved > max(lease, patience):
        return Isolation.END
    return Isolation.GO_ON
