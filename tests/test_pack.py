"""Packing loses nothing, adds no padding, and depends only on the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.pack import build_batch
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.plans.epoch import PackedEpoch
from tunesmith.plans.packing import WINDOW, count_packs, pack_lengths
from tunesmith.plans.plan import ShuffledPlan


def make_store(folder: Path, lengths: list[int]) -> TokenStore:
    rng = np.random.default_rng(0)
    with StoreWriter(folder / "tokens") as writer:
        for number, length in enumerate(lengths, 1):
            mask = (rng.random(length) < 0.6).astype(np.uint8)
            mask[-1] = 1
            sample = Sample(rng.integers(0, 400, length).astype(np.uint32), mask)
            writer.add(LabelledRow("x.jsonl", number, "used", samples=(sample,)))
    return open_store(folder / "tokens")


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_everything_once_and_never_too_much(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 100, 500).tolist()
    packs = pack_lengths(lengths, 128)
    assert sorted(i for pack in packs for i in pack) == list(range(500))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= 128
    assert sum(lengths) / (len(packs) * 128) > 0.97


def test_a_sample_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack_lengths([5, 11], 10)
    with pytest.raises(ValueError, match="does not fit"):
        count_packs(np.array([5, 11]), 10)


def plan_epoch(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The packs of an epoch as runs have had them from the first version on: all windows packed, then shuffled."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    packs = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packs += [window[pack] for pack in pack_lengths(lengths[window].tolist(), capacity)]
    return [packs[i] for i in rng.permutation(len(packs))]


def test_epochs_differ_and_repeat_by_seed() -> None:
    lengths = np.arange(1, 60)
    plans = {
        (s, e): [p.tolist() for p in ShuffledPlan(np.arange(59), lengths, 64, s).packs(e)]
        for s in (0, 1)
        for e in (0, 1)
    }
    assert plans[0, 0] == [p.tolist() for p in plan_epoch(lengths, 64, 0, 0)]
    assert len({str(p) for p in plans.values()}) == 4
    assert sorted(i for pack in plans[0, 1] for i in pack) == list(range(59))


def test_store_gives_back_what_was_written(tmp_path: Path) -> None:
    lengths = [5, 1, 9]
    store = make_store(tmp_path, lengths)
    assert store.lengths.tolist() == lengths
    assert store.where(2) == "x.jsonl:3"
    rng = np.random.default_rng(0)
    rng.random(5)
    assert store[0].input_ids.tolist() == rng.integers(0, 400, 5).tolist()


def test_batch_positions_targets_and_counts(tmp_path: Path) -> None:
    store = make_store(tmp_path, [4, 3])
    batch = build_batch(store, np.array([1, 0]))
    assert batch.layout.lens == [3, 4]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    first, second = store[1], store[0]
    ids = [*first.input_ids, *second.input_ids]
    assert batch.input_ids[0].tolist() == ids
    trained = [*first.loss_mask, *second.loss_mask]
    trained[0] = trained[3] = 0  # a document's first token cannot be predicted
    assert batch.targets.tolist() == [token for token, is_trained in zip(ids, trained, strict=True) if is_trained]
    assert [ids[at + 1] for at in batch.target_at] == batch.targets.tolist()
    assert all(trained[at + 1] for at in batch.target_at)
    assert batch.num_targets == first.num_targets + second.num_targets


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(1, 60), max_size=200))
def test_packs_are_counted_without_packing(capacity: int, lengths: list[int]) -> None:
    lengths = [min(length, capacity) for length in lengths]
    assert count_packs(np.array(lengths, np.int64), capacity) == len(pack_lengths(lengths, capacity))


@pytest.mark.parametrize("num_samples", [1, 50, WINDOW, WINDOW + 1, 2 * WINDOW + 77])
def test_packs_made_on_demand_are_those_of_a_whole_plan(num_samples: int) -> None:
    """In any order of asking, with one window and with several, and also where some samples are held out."""
    lengths = np.random.default_rng(num_samples).geometric(0.02, num_samples).clip(1, 512)
    samples = np.arange(num_samples)[: -(num_samples // 9) or None]
    plan = ShuffledPlan(samples, lengths, 512, 3)
    for epoch in (5, 0, 1):
        expected = [samples[pack].tolist() for pack in plan_epoch(lengths[samples], 512, 3, epoch)]
        assert plan.count(epoch) == len(expected)
        packs = plan.packs(epoch)
        assert packs[len(packs) // 2].tolist() == expected[len(packs) // 2]
        assert [pack.tolist() for pack in packs[-3:]] == expected[-3:]
        assert [pack.tolist() for pack in packs] == expected
        with pytest.raises(IndexError):
            packs[len(expected)]


def test_the_first_packs_need_few_windows() -> None:
    lengths = np.random.default_rng(0).geometric(0.02, 20 * WINDOW).clip(1, 512)
    packs = ShuffledPlan(np.arange(len(lengths)), lengths, 512, 3).packs(0)
    assert isinstance(packs, PackedEpoch)
    packs[:4]
    assert packs.num_packed <= 4


def test_an_empty_store_opens(tmp_path: Path) -> None:
    assert len(make_store(tmp_path, [])) == 0
