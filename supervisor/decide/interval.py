"""How often to checkpoint: the interval that loses least time to saving and to steps done again.

Saving often costs ``cost`` seconds each time; saving rarely costs, at each failure, half an interval of work on
average. With failures that come as a Poisson process of mean ``mtbf`` the optimum is

- to first order, ``sqrt(2 * cost * mtbf)``:
  J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974, 530-531;
- to higher order, equation 37 of J. T. Daly, A higher order estimate of the optimum checkpoint interval for
  restart dumps, Future Generation Computer Systems 22(3), 2006, 303-312. It stays sound when saving takes a good
  part of the time between failures, where the first order one does not.

Both give the time of work between two saves, the save itself not included.
"""

from __future__ import annotations

import math
from typing import Final

from supervisor.record import JobRecord

MTBF_PRIOR: Final = 6 * 3600.0  # seconds; replaced by the job's own failures as they come
COST_PRIOR: Final = 1.0  # seconds to write a checkpoint, before one was written
SHORTEST_AUTO: Final = 10.0  # seconds between checkpoints at least
LONGEST_AUTO: Final = 3600.0


def auto(record: JobRecord, cost: float | None) -> float:
    """Seconds between checkpoints for ``--checkpoint-every auto``; ``cost``: of the last one, None before the first."""
    mtbf = estimate_mtbf(
        failures=record.restarts + record.preemptions, seconds=record.spent.supervised, prior=MTBF_PRIOR
    )
    cost = COST_PRIOR if cost is None else cost
    return young_daly(cost, mtbf, shortest=SHORTEST_AUTO, longest=LONGEST_AUTO)


def young(cost: float, mtbf: float) -> float:
    """Seconds of work between saves, to first order (Young 1974)."""
    _check(cost, mtbf)
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Seconds of work between saves, to higher order (Daly 2006, equation 37)."""
    _check(cost, mtbf)
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def young_daly(cost: float, mtbf: float, *, shortest: float = 1.0, longest: float = 86400.0) -> float:
    """The interval to use, in seconds: Daly's, but at least ``shortest`` and at most ``longest``.

    ``cost`` and ``mtbf`` (mean time between failures) are in seconds. Raises ValueError when ``cost`` is negative
    or not finite, ``mtbf`` not positive, or the bounds cross. An infinite ``mtbf`` yields ``longest``.
    """
    if not 0 < shortest <= longest:
        raise ValueError(f"bounds of {shortest!r} s and {longest!r} s: 0 < shortest <= longest is required")
    _check(cost, mtbf)
    if math.isinf(mtbf):
        return longest
    return min(max(daly(cost, mtbf), shortest), longest)


def estimate_mtbf(*, failures: int, seconds: float, prior: float) -> float:
    """The mean time between failures after ``failures`` in ``seconds`` of training, starting from ``prior``.

    The posterior mean rate of a Poisson process under a Gamma(1, ``prior``) prior: as if one failure had been seen
    in ``prior`` seconds before.
    """
    if failures < 0 or not seconds >= 0 or not prior > 0:
        raise ValueError(f"{failures} failures in {seconds!r} s with a prior of {prior!r} s")
    return (prior + seconds) / (1 + failures)


def _check(cost: float, mtbf: float) -> None:
    if not 0 <= cost < math.inf:
        raise ValueError(f"a cost of {cost!r} s is not a time")
    if not mtbf > 0:
        raise ValueError(f"a mean time between failures of {mtbf!r} s is not positive")
