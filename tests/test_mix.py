"""Mixing: shares of tokens along the run, passes that repeat no row, and each source's loss."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.plans.mix import Mix, MixedPlan, SourceLine, exact, quotas_by_epochs, quotas_by_weight
from tunesmith.plans.plan import count_steps


def make_plan(
    sizes: list[int], means: list[int], weights: list[float] | None = None, epochs: list[float] | None = None,
    capacity: int = 2048, seed: int = 0,
) -> tuple[MixedPlan, np.ndarray, np.ndarray]:  # fmt: skip
    """A plan over random lengths; the sources lie one after another, as in a store."""
    rng = np.random.default_rng(1)
    lengths = np.concatenate(
        [rng.lognormal(np.log(mean), 0.7, size).clip(4, capacity) for size, mean in zip(sizes, means, strict=True)]
    ).astype(np.int64)
    source_of = np.repeat(np.arange(len(sizes)), sizes).astype(np.int16)
    tokens = [int(lengths[source_of == number].sum()) for number in range(len(sizes))]
    quotas = quotas_by_weight(tokens, weights) if weights else quotas_by_epochs(tokens, epochs or [])
    mix = Mix(tuple("abcdef"[: len(sizes)]), source_of, quotas)
    return MixedPlan(np.arange(len(lengths)), lengths, mix, capacity, seed), lengths, source_of


MIXES: list[dict[str, Any]] = [
    {"sizes": [9_000, 15_000], "means": [200, 800], "weights": [0.7, 0.3]},
    {"sizes": [9_000, 15_000, 400], "means": [200, 1500, 100], "weights": [0.7, 0.29, 0.01]},
    {"sizes": [20_000, 60_000], "means": [60, 2000], "weights": [1, 1]},
    {"sizes": [10_000, 15_000, 2_000], "means": [200, 800, 300], "epochs": [1, 0.5, 3]},
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_shares_hold_over_any_10000_samples(mix: dict[str, Any]) -> None:
    """Within one percent of what was asked, in the order of training and across passes."""
    plan, lengths, source_of = make_plan(**mix)
    assert plan.mix.quotas is not None
    asked = np.array([float(quota / sum(plan.mix.quotas)) for quota in plan.mix.quotas])
    trained = np.concatenate([pack for epoch in range(3) for pack in plan.packs(epoch)])
    tokens = np.zeros((len(trained) + 1, len(asked)))
    tokens[np.arange(1, len(trained) + 1), source_of[trained]] = lengths[trained]
    sums = tokens.cumsum(0)
    windows = sums[10_000:] - sums[:-10_000]
    shares = windows / windows.sum(1, keepdims=True)
    assert len(shares) > 1_000
    assert np.abs(shares - asked).max() < 0.01


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_packs_of_a_mix_are_those_of_its_order(mix: dict[str, Any]) -> None:
    plan, lengths, _ = make_plan(**mix)
    for epoch in (2, 0):
        packs = list(plan.packs(epoch))
        assert len(packs) == plan.count(epoch)
        assert max(int(lengths[pack].sum()) for pack in packs) <= plan.capacity
        assert sorted(np.concatenate(packs)) == sorted(plan.order(epoch))
        again = make_plan(**mix)[0].packs(epoch)
        assert [pack.tolist() for pack in again] == [pack.tolist() for pack in packs]


def test_a_weighted_pass_repeats_no_row_and_ends_with_the_first_source_that_is_used_up() -> None:
    plan, _, source_of = make_plan([500, 700, 90], [50, 80, 30], weights=[0.5, 0.4, 0.1])
    seen = np.zeros(len(source_of), int)
    for epoch in range(12):
        order = plan.order(epoch)
        assert len(np.unique(order)) == len(order)
        seen[order] += 1
    full = [number for number in range(3) if set(seen[source_of == number]) == {12}]
    assert len(full) == 1  # all of its rows, in every pass
    for number in range(3):  # surplus rows come in later passes: none falls behind
        assert np.ptp(seen[source_of == number]) <= 2


def test_epochs_of_a_source_are_its_passes_in_each_pass() -> None:
    plan, _, source_of = make_plan([400, 600, 50], [50, 80, 30], epochs=[1, 0.5, 3])
    first, second = plan.order(0), plan.order(1)
    counts = [np.bincount(order, minlength=len(source_of)) for order in (first, second)]
    assert set(counts[0][source_of == 0]) == {1}
    assert set(counts[0][source_of == 1]) == {0, 1}
    assert set((counts[0] + counts[1])[source_of == 1]) == {1}  # two halves are the whole
    assert set(counts[0][source_of == 2]) == {3}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=25), min_size=1, max_size=4),
    st.data(),
    st.integers(0, 3),
)
def test_sources_are_interleaved_in_proportion(sources: list[list[int]], data: st.DataObject, seed: int) -> None:
    """At any point of any pass each source has given its share of the tokens, up to its longest sample."""
    lengths = np.array([length for source in sources for length in source])
    source_of = np.repeat(np.arange(len(sources)), [len(source) for source in sources]).astype(np.int16)
    weights = [data.draw(st.floats(0.01, 10)) for _ in sources]
    quotas = quotas_by_weight([sum(source) for source in sources], weights)
    plan = MixedPlan(
        np.arange(len(lengths)), lengths, Mix(tuple(map(str, range(len(sources)))), source_of, quotas), 32, seed
    )
    share = np.array([float(quota / sum(quotas)) for quota in quotas])
    longest = np.array([max(source) for source in sources])
    total = np.zeros(len(sources))
    for epoch in range(4):
        order = plan.order(epoch)
        assert len(np.unique(order)) == len(order)
        given = np.zeros(len(sources))
        for sample in order:
            # of each source, what it gave and what it should have given while the others gave theirs
            given[source_of[sample]] += lengths[sample]
            assert np.all(given <= share * given.sum() + longest.sum() + 1)
        total += given
    expected = np.array([float(4 * quota) for quota in quotas])
    assert np.all(np.abs(total - expected) <= longest)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.fractions(Fraction(1, 50), 3), st.integers(0, 5))
def test_an_endless_order_is_the_same_from_any_pass(lengths: list[int], times: Fraction, first: int) -> None:
    tokens = np.array(lengths)

    def line() -> SourceLine:
        return SourceLine(np.arange(len(tokens)), tokens, times * int(tokens.sum()), (3,))

    taken = [line().take(number)[0].tolist() for number in range(first + 3)]
    one = line()
    assert [one.take(number)[0].tolist() for number in range(first + 3)] == taken
    assert one.take(first)[0].tolist() == taken[first]
    every = [sample for pass_ in taken for sample in pass_]
    for start in range(0, len(every) - len(tokens) + 1, len(tokens)):  # cycle after cycle, each sample once
        assert len(set(every[start : start + len(tokens)])) == len(tokens)
    if times <= 1:
        assert all(len(set(pass_)) == len(pass_) for pass_ in taken)


def test_weights_are_read_as_they_are_written() -> None:
    assert exact(0.1) == Fraction(1, 10)
    assert quotas_by_weight([100, 300], [0.1, 0.3]) == (100, 300)
    assert quotas_by_weight([100, 300], [7, 3]) == quotas_by_weight([100, 300], [0.7, 0.3])
    assert quotas_by_epochs([10, 20], [0.3, 2]) == (3, 40)


def test_steps_of_a_mix_are_counted_by_its_passes() -> None:
    plan, _, _ = make_plan([500, 700], [50, 80], weights=[0.5, 0.5])
    counts = [-(-plan.count(epoch) // 2) for epoch in range(3)]
    assert count_steps(plan, 2, 2) == sum(counts[:2])
    assert count_steps(plan, 2, 2.5) == round(sum(counts[:2]) + counts[2] / 2)
