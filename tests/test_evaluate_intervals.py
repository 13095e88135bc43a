"""Bootstrap intervals hold the true value as often as they say, and differences are paired."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.evaluation.intervals import Counted, ratio, resample_sums, score_models, tail

RUNS = 300


def means(values) -> Counted:
    values = np.asarray(values, dtype=float)
    return Counted(np.stack([values, np.ones_like(values)], axis=1), ratio)


def share_of_hits(draw, truth: float, size: int, paired: bool = False) -> float:
    rng = np.random.default_rng(1)
    hits = 0
    for run in range(RUNS):
        given = draw(rng, size)
        models = [{"x": one} for one in (given if paired else [given])]
        scores, differences = score_models(models, [(0, 1)] if paired else [], seed=run)
        score = (differences if paired else scores)[0]["x"]
        hits += score.low <= truth <= score.high
    return hits / RUNS


@pytest.mark.parametrize("size", [12, 60])
@pytest.mark.parametrize("kind", ["normal", "share", "ratio"])
def test_intervals_cover_the_true_value(kind: str, size: int) -> None:
    def draw(rng, count):
        if kind == "normal":
            return means(rng.normal(3.0, 2.0, count))
        if kind == "share":
            return Counted(
                np.stack([rng.random(count) < 0.3, np.ones(count)], axis=1).astype(float), ratio, is_share=True
            )
        lengths = rng.integers(1, 40, count)  # rows of several tokens: the loss of a corpus
        return Counted(np.stack([lengths * rng.gamma(4.0, 0.5, count), lengths], axis=1), ratio)

    truth = {"normal": 3.0, "share": 0.3, "ratio": 2.0}[kind]
    assert 0.91 <= share_of_hits(draw, truth, size) <= 0.99


def test_paired_intervals_cover_and_are_narrower() -> None:
    def draw(rng, count):
        hardness = rng.normal(0, 5, count)  # what both models find hard
        return [means(hardness + rng.normal(0.5, 1, count)), means(hardness + rng.normal(0, 1, count))]

    assert 0.91 <= share_of_hits(draw, 0.5, 40, paired=True) <= 0.99
    models = [{"x": one} for one in draw(np.random.default_rng(0), 40)]
    scores, ((difference,),) = (
        score_models(models, [(0, 1)], 0)[0],
        [list(d.values()) for d in score_models(models, [(0, 1)], 0)[1]],
    )
    assert difference.value == pytest.approx(scores[0]["x"].value - scores[1]["x"].value)
    assert difference.high - difference.low < 0.5 * (scores[0]["x"].high - scores[0]["x"].low)


def test_rows_are_drawn_whole_and_as_many_as_there_are() -> None:
    sums = resample_sums(np.eye(7), seed=4, resamples=500)
    assert (sums.sum(axis=1) == 7).all()
    assert np.allclose(sums.mean(axis=0), 1, atol=0.2)
    assert sums.max() >= 3
    assert np.array_equal(sums, resample_sums(np.eye(7), seed=4, resamples=500))
    assert not np.array_equal(sums, resample_sums(np.eye(7), seed=5, resamples=500))


def test_the_percentile_is_that_of_students_t() -> None:
    # t(0.975) of 4, 9 and 99 degrees: 2.776, 2.262, 1.984
    from statistics import NormalDist

    for size, quantile in ((5, 2.776), (10, 2.262), (100, 1.984)):
        assert tail(size) == pytest.approx(NormalDist().cdf(-((size / (size - 1)) ** 0.5) * quantile), rel=5e-3)
    assert tail(1) == 0.0
    assert 0.024 < tail(10_000) < 0.025


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.1684), (20, 0.8316, 1.0)])
def test_a_share_of_none_or_all_has_an_interval(hits: int, low: float, high: float) -> None:
    share = Counted(np.stack([np.arange(20) < hits, np.ones(20)], axis=1).astype(float), ratio, is_share=True)
    score = score_models([{"x": share}], [], 0)[0][0]["x"]
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-4)


def test_a_difference_of_none_and_all_has_an_interval() -> None:
    shares = [Counted(np.stack([np.full(20, hits), np.ones(20)], axis=1), ratio, is_share=True) for hits in (1.0, 0.0)]
    _scores, differences = score_models([{"x": shares[0]}, {"x": shares[1]}], [(0, 1), (1, 0)], 0)
    assert (differences[0]["x"].low, differences[0]["x"].high) == pytest.approx((1 - 2 * 0.1684, 1.0), abs=1e-3)
    assert (differences[1]["x"].low, differences[1]["x"].high) == pytest.approx((-1.0, 2 * 0.1684 - 1), abs=1e-3)


def test_what_cannot_be_known_is_left_out() -> None:
    nothing = Counted(np.zeros((5, 2)), ratio)
    one_row = Counted(np.array([[2.0, 1.0], *[[0.0, 0.0]] * 4]), ratio)
    models = [{"nothing": nothing, "one": one_row, "more": one_row}, {"nothing": nothing, "one": one_row}]
    scores, differences = score_models(models, [(0, 1)], 0)
    assert (scores[0]["nothing"].value, scores[0]["nothing"].rows) == (None, 0)
    assert (scores[0]["one"].value, scores[0]["one"].low, scores[0]["one"].rows) == (2.0, None, 1)
    assert (differences[0]["one"].value, differences[0]["one"].low) == (0.0, None)
    assert set(differences[0]) == {"nothing", "one"}
    assert differences[0]["nothing"].value is None
