"""Has the loss stopped falling?

A loss that follows a power law falls ever more slowly, but always by much from the second quarter of a run to the last. So the
mean losses of these two are compared: what is compared grows with the run, and the noise in it gets less. A run that stops
falling is told of when it is three to four times as long as it was then.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

LEAST: Final = 1000
LEVEL: Final = 4
BLOCK: Final = 10
MOST_BLOCKS: Final = 128
OUTLIER: Final = 4.0  # mean absolute deviations


class _Block(NamedTuple):
    """Some samples in a row, the first of them at ``step``."""

    step: int
    samples: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """Of the losses."""
        return self.total / self.samples

    @property
    def variance(self) -> float:
        """Of the losses."""
        return max(0.0, self.squares / self.samples - self.mean**2)

    def with_(self, other: _Block) -> _Block:
        """Both, this one first."""
        return _Block(
            self.step, self.samples + other.samples, self.total + other.total, self.squares + other.squares
        )


class Plateau:
    """All losses so far in a hundred blocks at most, whose size doubles as the run gets longer."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._size = BLOCK
        self._open: _Block | None = None
        self._smooth = self._noise = 0.0
        self._level = 0  # checks in a row in which it had not fallen
        self._is_flat = False

    def see(self, step: int, loss: float) -> tuple[int, float, float] | None:
        """While it does not fall: the step since which, the mean then and now."""
        loss = self._tamed(loss)
        one = _Block(step, 1, loss, loss * loss)
        self._open = one if self._open is None else self._open.with_(one)
        if self._open.samples >= self._size:
            self._blocks.append(self._open)
            self._open = None
            self._check()
            if len(self._blocks) >= MOST_BLOCKS:
                pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
                self._blocks = [first.with_(second) for first, second in pairs]
                self._size *= 2
        if not self._is_flat:
            return None
        then, now = self._quarters()
        return then.step, then.mean, now.mean

    def _tamed(self, loss: float) -> float:
        """Without outliers, of which one could weigh as much as a quarter of the run."""
        if not self._blocks and self._open is None:
            self._smooth = loss
        rise = loss - self._smooth
        if self._noise and self._blocks:
            rise = max(-OUTLIER * self._noise, min(OUTLIER * self._noise, rise))
        self._smooth += 0.05 * rise
        self._noise += 0.05 * (abs(rise) - self._noise)
        return self._smooth + rise * 0.95

    def _quarters(self) -> tuple[_Block, _Block]:
        """The second and the last quarter of the run."""
        quarter = len(self._blocks) // 4
        second, last = self._blocks[quarter : 2 * quarter], self._blocks[-quarter:]
        return _joined(second), _joined(last)

    def _check(self) -> None:
        if len(self._blocks) * self._size < LEAST:
            return
        then, now = self._quarters()
        fallen = then.mean - now.mean
        error = math.sqrt(then.variance / then.samples + now.variance / now.samples)
        self._level = self._level + 1 if fallen <= 0 else 0
        if self._is_flat:
            self._is_flat = fallen <= 2 * error
        else:
            self._is_flat = self._level >= LEVEL


def _joined(blocks: list[_Block]) -> _Block:
    first, *others = blocks
    for other in others:
        first = first.with_(other)
    return first
