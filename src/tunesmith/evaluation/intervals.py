"""Bootstrap intervals of scores, and of differences of two models on the same rows.

Rows are drawn with replacement, as many as there are; a row brings all its replies along, since they are not
independent. All scores are functions of counts that are summed over rows, so a resample needs only sums. The interval
is the percentile interval (Efron 1979) with its percentiles widened for small samples as in Hesterberg (2015, "What
Teachers Should Know About the Bootstrap", 4.4.2). Two models are compared on the same resamples (paired; Koehn 2004).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from tunesmith.evaluation.records import Score

RESAMPLES = 2000
CONFIDENCE = 0.95
METHOD = (
    f"{CONFIDENCE:.0%} percentile bootstrap over rows (Efron 1979), widened for small samples (Hesterberg 2015), "
    f"{RESAMPLES:,} resamples; differences on the same resamples (Koehn 2004); shares of 0 % and 100 %: Clopper-Pearson"
)
_CHUNK = 4_000_000  # numbers drawn at once
_LEAST_ROWS = 3  # for an interval

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """A score as a function of counts that are summed over rows.

    Attributes:
        counts: [rows, counts]; zeros for a row that the score does not apply to.
        score: of summed counts [..., counts]; not a number where it is undefined.
        is_share: whether it is a share whose first count is at most its second.
    """

    counts: Array
    score: Callable[[Array], Array]
    is_share: bool = False

    @property
    def value(self) -> float | None:
        return _number(self.score(self.counts.sum(axis=0)))

    @property
    def num_rows(self) -> int:
        """Rows that the score applies to."""
        return int((self.counts != 0).any(axis=1).sum())


def ratio(sums: Array) -> Array:
    """The first of two summed counts over the second."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = sums[..., 0] / sums[..., 1]
    return found


def _number(value: Array | float) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def resample_sums(counts: Array, seed: int, resamples: int = RESAMPLES) -> Array:
    """[resamples, counts]: counts [rows, counts] summed over rows drawn with replacement."""
    num_rows = len(counts)
    rng = np.random.default_rng([seed, 0xB007])
    sums = []
    at_once = max(1, _CHUNK // max(1, num_rows))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = rng.integers(num_rows, size=(size, num_rows))
        drawn += np.arange(size)[:, None] * num_rows
        times = np.bincount(drawn.reshape(-1), minlength=size * num_rows).reshape(size, num_rows)
        sums.append(times.astype(np.float64) @ counts)
    return np.concatenate(sums)


def tail(num_rows: int, confidence: float = CONFIDENCE) -> float:
    """The lower percentile of an interval: smaller than (1 - confidence) / 2, since a small sample varies less than
    its population and its mean has the t distribution."""
    if num_rows < 2:
        return 0.0
    quantile = _t_quantile(1 - (1 - confidence) / 2, num_rows - 1)
    return NormalDist().cdf(-math.sqrt(num_rows / (num_rows - 1)) * quantile)


def _t_quantile(share: float, degrees: int) -> float:
    """Quantile of Student's t distribution: exact for 1 and 2 degrees of freedom, else the expansion in 1 / degrees
    (Abramowitz and Stegun 26.7.5)."""
    if degrees == 1:
        return math.tan(math.pi * (share - 0.5))
    if degrees == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))


def _limits(values: Array, num_rows: int) -> tuple[float | None, float | None]:
    values = values[np.isfinite(values)]
    if num_rows < _LEAST_ROWS or not len(values):
        return None, None
    low = tail(num_rows)
    found = np.quantile(values, [low, 1 - low])
    return float(found[0]), float(found[1])


def _share_limits(value: float, num_rows: int) -> tuple[float | None, float | None]:
    """Clopper and Pearson's limits of a share that is 0 or 1 in every row, where no resample differs."""
    far = _far(num_rows)
    return (0.0, 1 - far) if value == 0 else (far, 1.0)


def _far(num_rows: int) -> float:
    """The lower limit of a share of 1 in this many rows."""
    return float(((1 - CONFIDENCE) / 2) ** (1 / num_rows))


def score_models(
    models: Sequence[Mapping[str, Counted]], pairs: Sequence[tuple[int, int]], seed: int
) -> tuple[list[dict[str, Score]], list[dict[str, Score]]]:
    """Scores of each model, and of each pair the differences of its first model to its second.

    Args:
        models: the counts of each, over the same rows in the same order.
        pairs: (model, reference) by their places.
    """
    drawn = [_resample(model, seed) for model in models]
    scores = [
        {name: _score(counted, values[name]) for name, counted in model.items()}
        for model, values in zip(models, drawn, strict=True)
    ]
    differences = []
    for one, other in pairs:
        names = [name for name in models[one] if name in models[other]]
        differences.append(
            {
                name: _difference(
                    models[one][name], models[other][name], drawn[one][name] - drawn[other][name]
                )
                for name in names
            }
        )  # fmt: skip
    return scores, differences


def _resample(model: Mapping[str, Counted], seed: int) -> dict[str, Array]:
    """Name -> the score in each resample; equal seeds draw equal rows."""
    if not model:
        return {}
    widths = [counted.counts.shape[1] for counted in model.values()]
    sums = resample_sums(np.concatenate([counted.counts for counted in model.values()], axis=1), seed)
    parts = np.split(sums, np.cumsum(widths)[:-1], axis=1)
    return {name: counted.score(part) for (name, counted), part in zip(model.items(), parts, strict=True)}


def _score(counted: Counted, resampled: Array) -> Score:
    value, rows = counted.value, counted.num_rows
    if value is None:
        return Score(None, rows=rows)
    if counted.is_share and value in (0.0, 1.0):
        low, high = _share_limits(value, rows)
    else:
        low, high = _limits(resampled, rows)
    return Score(value, low, high, rows)


def _difference(one: Counted, other: Counted, resampled: Array) -> Score:
    applies = ((one.counts != 0).any(axis=1) | (other.counts != 0).any(axis=1)).sum()
    if one.value is None or other.value is None:
        return Score(None, rows=int(applies))
    if np.array_equal(one.counts, other.counts):
        return Score(0.0, rows=int(applies))  # no row differs, so nothing can be said of others
    if one.is_share and one.value in (0.0, 1.0) and other.value in (0.0, 1.0):  # no resample differs
        least = 2 * _far(int(applies)) - 1  # both shares at their far limits
        return Score(one.value - other.value, *((least, 1.0) if one.value else (-1.0, -least)), int(applies))
    low, high = _limits(resampled, int(applies))
    return Score(one.value - other.value, low, high, int(applies))
