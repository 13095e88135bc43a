"""What a noisy curve did: how far it fell, whether that is more than noise, and where it rose again."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = 5  # the first and the last fifth of a curve are compared
_LARGEST_WINDOW = 200  # points
_CLEAR = 3.0  # standard errors
_FEW, _UNKNOWN = 8, 0.05  # with fewer points their noise is not known, and at least this share of a loss is assumed
_MEDIAN_STEP = 0.954  # median of |difference of neighbours| over sigma, for normal noise


@dataclass(frozen=True, slots=True)
class Change:
    """From the mean of a curve's first points to that of its last.

    Attributes:
        error: standard error of the difference, from the noise between neighbours.
    """

    first: float
    last: float
    error: float

    @property
    def fall(self) -> float:
        return self.first - self.last

    @property
    def share(self) -> float:
        """The fall as a share of the first value."""
        return self.fall / self.first if self.first > 0 else 0.0

    @property
    def has_fallen(self) -> bool:
        return self.fall > _CLEAR * self.error

    @property
    def has_risen(self) -> bool:
        return -self.fall > _CLEAR * self.error


def noise_of(ys: Sequence[float]) -> float:
    """Standard deviation of the noise of single points, whatever the curve's slope; single jumps do not count."""
    steps = [abs(after - before) for before, after in itertools.pairwise(ys)]
    return statistics.median(steps) / _MEDIAN_STEP if len(steps) > 1 else 0.0


def change_of(ys: Sequence[float]) -> Change:
    """Compare the first fifth with the last; a third where there are fewer than 15 points."""
    size = max(1, min(len(ys) // (_WINDOW if len(ys) >= 3 * _WINDOW else 3), _LARGEST_WINDOW))
    first = statistics.fmean(ys[:size])
    noise = noise_of(ys) if len(ys) >= _FEW else max(noise_of(ys), _UNKNOWN * first)
    return Change(first, statistics.fmean(ys[-size:]), noise * math.sqrt(2 / size))


@dataclass(frozen=True, slots=True)
class Rise:
    """The largest rise of a curve above the lowest value before it.

    Attributes:
        low_at, high_at: indexes of the two.
        is_clear: whether it is more than noise.
    """

    low: float
    high: float
    low_at: int
    high_at: int
    is_clear: bool

    @property
    def share(self) -> float:
        return (self.high - self.low) / self.low if self.low > 0 else 0.0


def largest_rise(ys: Sequence[float], start: float) -> Rise:
    """Found on running medians, so that one bad batch is no rise.

    Args:
        start: value before the first point.
    """
    size = max(3, min(len(ys) // 20, 51)) | 1
    if len(ys) < 2 * size:
        return Rise(ys[0], ys[0], 0, 0, is_clear=False)
    medians = [statistics.median(ys[at : at + size]) for at in range(len(ys) - size + 1)]
    half, low, best = size // 2, (start, 0), (0.0, (start, 0), 0)
    for at, value in enumerate(medians):
        if value < low[0]:
            low = value, at + half
        best = max(best, (value - low[0], low, at))
    rise, (lowest, low_at), high_at = best
    error = 1.25 * noise_of(ys) * math.sqrt(2 / size)  # a median has 1.25 times the error of a mean
    return Rise(lowest, medians[high_at], low_at, high_at + half, rise > 2 * _CLEAR * error)
