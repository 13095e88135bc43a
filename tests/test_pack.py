"""Packing loses nothing, adds no padding, and depends only on the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.pack import WINDOW, build_batch, count_epoch, count_packs, pack_lengths, plan_epoch
from tunesmith.data.store import StoreWriter, TokenStore, open_store


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


def test_epochs_differ_and_repeat_by_seed() -> None:
    lengths = np.arange(1, 60)
    plans = {(s, e): [p.tolist() for p in plan_epoch(lengths, 64, s, e)] for s in (0, 1) for e in (0, 1)}
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


@pytest.mark.parametrize("num_samples", [50, WINDOW, WINDOW + 1, 2 * WINDOW + 77])
def test_epochs_are_counted_without_packing(num_samples: int) -> None:
    """With one window and with several: the count equals the number of packs in the plan."""
    lengths = np.random.default_rng(num_samples).geometric(0.02, num_samples).clip(1, 512)
    for epoch in (0, 1, 5):
        assert count_epoch(lengths, 512, 3, epoch) == len(plan_epoch(lengths, 512, 3, epoch))


def test_an_empty_store_opens(tmp_path: Path) -> None:
    assert len(make_store(tmp_path, [])) == 0
