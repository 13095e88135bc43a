"""Packs of prefix trees: what samples share is found exactly, nothing is lost, and no pack is too large."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from test_pack import make_store
from tunesmith.data.feed import Batches, Feed
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.plans.mix import Mix, MixedPlan, quotas_by_epochs
from tunesmith.plans.packers import TreePacker
from tunesmith.plans.plan import Plan, ShuffledPlan
from tunesmith.plans.prefixes import Prefixes, find_prefixes
from tunesmith.plans.tree import build_tree


def random_store(folder: Path, seed: int) -> TokenStore:
    """Rows of samples that begin as others do: of their row, and of other rows."""
    rng = np.random.default_rng(seed)
    samples = [rng.integers(0, 4, rng.integers(1, 40))]
    with StoreWriter(folder / str(seed)) as writer:
        for row in range(1, int(rng.integers(2, 25))):
            own = []
            for _ in range(rng.integers(1, 5)):
                old = samples[rng.integers(len(samples))]
                cut = rng.integers(0, len(old) + 1)
                samples.append(np.concatenate([old[:cut], rng.integers(0, 4, rng.integers(0 if cut else 1, 60))]))
                mask = np.ones(len(samples[-1]), np.uint8)
                own.append(Sample(samples[-1].astype(np.uint32), mask))
            writer.add(LabelledRow("x.jsonl", row, "used", samples=tuple(own)))
    return open_store(folder / str(seed))


def prefixes_of(store: TokenStore, samples: np.ndarray | None = None) -> Prefixes:
    return find_prefixes(store, np.arange(len(store)) if samples is None else samples, store.row_ids)


@pytest.mark.parametrize("seed", range(60))
def test_tokens_are_counted_as_trees_have_them(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any choice of samples, also of one given twice; whatever is read at once."""
    monkeypatch.setattr("tunesmith.data.store.SHARD_TOKENS", 500)
    monkeypatch.setattr("tunesmith.plans.prefixes._CHUNK", 7)
    monkeypatch.setattr("tunesmith.plans.prefixes._MANY", 1 + seed % 9)
    store, rng = random_store(tmp_path, seed), np.random.default_rng(seed)
    known = np.sort(rng.permutation(len(store))[: max(1, 3 * len(store) // 4)])
    prefixes = prefixes_of(store, known)
    for _ in range(5):
        chosen = rng.choice(known, rng.integers(1, len(known) + 1))
        assert prefixes.count(chosen) == len(build_tree([store[int(n)].input_ids for n in chosen]).input_ids)


@pytest.mark.parametrize("seed", range(60))
def test_packs_hold_each_sample_once_and_never_too_much(seed: int, tmp_path: Path) -> None:
    store, rng = random_store(tmp_path, seed), np.random.default_rng(seed)
    prefixes, samples = prefixes_of(store), rng.permutation(len(store))
    packer = TreePacker(prefixes, int(store.lengths.max() + rng.integers(0, 300)))
    packs = packer.pack(samples)
    assert len(packs) == packer.count(samples)
    assert sorted(np.concatenate(packs)) == list(range(len(store)))
    counted = [prefixes.count(pack) for pack in packs]
    assert max(counted) <= packer.capacity
    assert sum(counted) == packer.count_tokens(samples)


def test_a_sample_longer_than_a_pack_is_an_error(tmp_path: Path) -> None:
    store = make_store(tmp_path, [20, 3])
    with pytest.raises(ValueError, match="does not fit"):
        TreePacker(prefixes_of(store), 19).pack(np.arange(2))


def store_with_prompts(folder: Path, prompts: int, rows: int, turns: int = 1) -> TokenStore:
    """Rows that begin with one of a few system prompts of 100 tokens, each of several samples."""
    rng = np.random.default_rng(0)
    systems = [rng.integers(0, 5000, 100) for _ in range(prompts)]
    with StoreWriter(folder / "tokens") as writer:
        for row in range(rows):
            history, own = systems[row % prompts], []
            for _ in range(turns):
                history = np.concatenate([history, rng.integers(0, 5000, 60)])
                own.append(Sample(history.astype(np.uint32), np.ones(len(history), np.uint8)))
                history = np.concatenate([history[:-5], rng.integers(0, 5000, 10)])
            writer.add(LabelledRow("x.jsonl", row + 1, "used", samples=tuple(own)))
    return open_store(folder / "tokens")


def test_samples_of_a_row_and_rows_with_one_prompt_come_together(tmp_path: Path) -> None:
    store = store_with_prompts(tmp_path, prompts=8, rows=400, turns=3)
    prefixes = prefixes_of(store)
    plan = ShuffledPlan(np.arange(len(store)), store.lengths, 1024, 1, prefixes)
    packs = list(plan.packs(0))
    assert len(packs) == plan.count(0)
    rows = [set(store.row_numbers[pack].tolist()) for pack in packs]
    assert sum(map(len, rows)) == 400  # no row is in two packs
    assert np.mean([len({(row - 1) % 8 for row in own}) for own in rows]) < 1.5
    computed = sum(prefixes.count(pack) for pack in packs)
    assert computed == plan.tokens_per_epoch < int(store.lengths.sum()) / 2.5
    assert computed / (len(packs) * 1024) > 0.8  # four rows of about 190 tokens and their prompt


def test_one_prompt_for_all_does_not_sort_the_rows(tmp_path: Path) -> None:
    """What all samples share brings nothing together: packs are as random as without it, and differ by epoch."""
    store = store_with_prompts(tmp_path, prompts=1, rows=600)
    prefixes = prefixes_of(store)
    plan = ShuffledPlan(np.arange(600), store.lengths, 512, 1, prefixes)
    for epoch in (0, 1):
        distances = [abs(np.diff(prefixes.rank[pack])).mean() for pack in plan.packs(epoch)]
        assert 150 < np.mean(distances) < 250  # of 600 random places: 200
    one, two = ([pack.tolist() for pack in plan.packs(epoch)] for epoch in (0, 1))
    assert one != two
    again = ShuffledPlan(np.arange(600), store.lengths, 512, 1, prefixes)
    assert [pack.tolist() for pack in again.packs(0)] == one


def test_without_common_prefixes_packs_are_as_many_as_without_sharing(tmp_path: Path) -> None:
    store = make_store(tmp_path, np.random.default_rng(0).integers(5, 60, 300).tolist())
    samples = np.arange(300)
    prefixes = prefixes_of(store)
    assert prefixes.shared.sum() == 0
    plans = [ShuffledPlan(samples, store.lengths, 128, 3, given) for given in (None, prefixes)]
    assert plans[0].count(0) == plans[1].count(0)
    assert [sorted(p) for p in plans[0].packs(0)] == [sorted(p) for p in plans[1].packs(0)]


def mixed_plan(store: TokenStore, prefixes: Prefixes | None) -> MixedPlan:
    source_of = (np.arange(len(store)) >= len(store) // 2).astype(np.int16)
    tokens = [int(store.lengths[source_of == source].sum()) for source in (0, 1)]
    mix = Mix(("a", "b"), source_of, quotas_by_epochs(tokens, [1, 2.5]))
    return MixedPlan(np.arange(len(store)), store.lengths, mix, 1024, 5, prefixes)


def test_a_mix_keeps_its_shares(tmp_path: Path) -> None:
    """Also where a source is taken more than once in a pass."""
    store = store_with_prompts(tmp_path, prompts=4, rows=200, turns=3)
    prefixes = prefixes_of(store)
    plan = mixed_plan(store, prefixes)
    taken = np.concatenate(list(plan.packs(0)))
    source = plan.mix.source_of[taken]
    for number, quota in enumerate(plan.mix.quotas or ()):
        assert abs(store.lengths[taken[source == number]].sum() - quota) < 600
    assert len(plan.packs(0)) == plan.count(0)
    assert plan.tokens_per_epoch == sum(prefixes.count(pack) for pack in plan.packs(0))
    assert max(prefixes.count(pack) for pack in plan.packs(0)) <= 1024


def feed_of(
    store: TokenStore, plan: Plan, prefixes: Prefixes, trains_once: bool = False, mix: Mix | None = None
) -> Feed:
    return Feed(store, plan, 3, 10, None, True, mix, prefixes, trains_once)


@pytest.mark.parametrize("trains_once", [False, True])
@pytest.mark.parametrize("is_mix", [False, True])
def test_what_a_step_counts_is_what_its_batches_have(tmp_path: Path, trains_once: bool, is_mix: bool) -> None:
    store = store_with_prompts(tmp_path, prompts=4, rows=100, turns=3)
    prefixes = prefixes_of(store)
    plan: Plan = ShuffledPlan(np.arange(len(store)), store.lengths, 1024, 1, prefixes)
    if is_mix:
        plan = mixed_plan(store, prefixes)
    feed = feed_of(store, plan, prefixes, trains_once, plan.mix if isinstance(plan, MixedPlan) else None)
    for step in itertools.islice(feed.steps(), 4):
        batches = list(step.whole)
        assert step.whole.num_tokens == sum(batch.num_tokens for batch in batches)
        assert step.whole.num_targets == sum(batch.num_targets for batch in batches)
        assert [step.whole.num_tokens_of(n) for n in range(len(batches))] == [batch.num_tokens for batch in batches]
        naive = Batches(store, step.whole.packs)
        assert step.whole.num_tokens < naive.num_tokens / 2
        assert (step.whole.num_targets == naive.num_targets) != trains_once
        sources = step.whole.count_sources()
        if is_mix:
            assert sum(sources.targets) == step.whole.num_targets
            assert sum(sources.tokens) == naive.num_tokens


@pytest.mark.parametrize("size", [2, 3])
def test_steps_continue_from_any_place_in_any_number_of_processes(tmp_path: Path, size: int) -> None:
    store = store_with_prompts(tmp_path, prompts=4, rows=100, turns=3)
    prefixes = prefixes_of(store)
    feed = feed_of(store, ShuffledPlan(np.arange(len(store)), store.lengths, 512, 1, prefixes), prefixes)
    steps = list(itertools.islice(feed.steps(), 30))  # into the second epoch
    assert steps[-1].epoch > 1
    again = list(itertools.islice(feed.steps(steps[9].place), 20))
    assert [step.rows() for step in again] == [step.rows() for step in steps[10:]]
    shares = [next(feed.steps(steps[9].place, rank, size)).batches for rank in range(size)]
    found = [batch.input_ids.tolist() for share in shares for batch in share if not batch.is_empty]
    assert sorted(found) == sorted(batch.input_ids.tolist() for batch in steps[10].batches)


def test_copies_of_a_sample_in_a_mix_do_not_come_together(tmp_path: Path) -> None:
    """As a source with 3 epochs has them: they would be one update of three times the weight."""
    store = store_with_prompts(tmp_path, prompts=4, rows=100, turns=3)
    samples = np.random.default_rng(0).permutation(np.repeat(np.arange(len(store)), 3))
    packer = TreePacker(prefixes_of(store), 1024)
    packs = packer.pack(samples)
    assert len(packs) == packer.count(samples)
    assert sorted(np.concatenate(packs)) == sorted(samples)
    together = sum(len(pack) - len(np.unique(pack)) for pack in packs)
    assert together < 0.2 * len(samples)
