"""The feed: the loop's steps, from any place and for any number of processes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from test_pack import make_store
from tunesmith.data.feed import Batches, Feed, plan_samples
from tunesmith.plans.plan import ShuffledPlan, count_steps

LENGTHS = [9, 3, 21, 14, 2, 17, 6, 30, 8, 8, 25, 12, 4]


def make_feed(folder: Path, is_packed: bool = True, packs_per_step: int = 4) -> Feed:
    store = make_store(folder, LENGTHS)
    samples = np.array([i for i in range(len(LENGTHS)) if i != 4])
    plan = ShuffledPlan(samples, store.lengths, 32, 7)
    total = count_steps(plan, packs_per_step, epochs=3)
    return Feed(store, plan, packs_per_step, total, Batches(store, [np.array([4])]), is_packed)


def documents(batches: Batches) -> list[tuple[int, ...]]:
    """The ids of every document."""
    found: list[tuple[int, ...]] = []
    for batch in batches:
        if batch.is_empty:
            continue
        ends = np.cumsum(batch.layout.lens)
        found += [tuple(part.tolist()) for part in np.split(batch.input_ids[0], ends[:-1])]
    return found


def test_an_epoch_has_every_sample_once(tmp_path: Path) -> None:
    feed = make_feed(tmp_path)
    for epoch in range(3):
        steps = itertools.takewhile(lambda step, end=epoch + 1: step.epoch <= end, feed.steps((epoch, 0)))
        rows = [row for step in steps for row in step.rows()]
        assert sorted(rows) == sorted(feed.store.where(index) for index in range(len(LENGTHS)) if index != 4)


def test_steps_go_on_from_any_place(tmp_path: Path) -> None:
    """The place is JSON; the following steps do not depend on the steps taken before."""
    feed = make_feed(tmp_path)
    steps = list(itertools.islice(feed.steps(), 12))
    for number, step in enumerate(steps[:-1]):
        place = json.loads(json.dumps(step.place))
        rest = list(itertools.islice(feed.steps(place), 11 - number))
        assert [s.rows() for s in rest] == [s.rows() for s in steps[number + 1 :]]
        assert [s.epoch for s in rest] == [s.epoch for s in steps[number + 1 :]]


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_all_ranks_are_the_step(tmp_path: Path, size: int, is_packed: bool) -> None:
    feed = make_feed(tmp_path, is_packed)
    shared = zip(*(feed.steps(rank=rank, size=size) for rank in range(size)), strict=True)
    for whole, parts in itertools.islice(zip(feed.steps(), shared, strict=True), 9):
        assert {part.place for part in parts} == {whole.place}
        assert {part.epoch for part in parts} == {whole.epoch}
        assert Counter(row for part in parts for row in part.batches.rows()) == Counter(whole.rows())
        assert all(part.rows() == whole.rows() for part in parts)
        assert len({len(list(part.batches)) for part in parts}) == 1  # of processes that share a model
        assert Counter(d for part in parts for d in documents(part.batches)) == Counter(documents(whole.batches))
        assert sum(part.batches.num_targets for part in parts) == whole.batches.num_targets


@pytest.mark.parametrize("is_packed", [True, False])
def test_batches_know_their_counts_before_they_are_built(tmp_path: Path, is_packed: bool) -> None:
    for step in itertools.islice(make_feed(tmp_path, is_packed).steps(), 5):
        built = list(step.batches)
        assert len(step.batches) == len(built)
        assert step.batches.num_tokens == sum(batch.num_tokens for batch in built)
        assert step.batches.num_targets == sum(batch.num_targets for batch in built)
        assert step.batches.num_samples == sum(len(batch.layout.lens) for batch in built)
        assert is_packed or all(len(batch.layout.lens) == 1 for batch in built)


@pytest.mark.parametrize("epochs", [0.01, 0.5, 1, 2.5, 4])
def test_steps_are_counted_as_they_come(tmp_path: Path, epochs: float) -> None:
    feed = make_feed(tmp_path, packs_per_step=2)
    samples = np.array([i for i in range(len(LENGTHS)) if i != 4])
    expected = 0.0
    for epoch in range(4):
        packs = plan_samples(feed.store, samples, 32, 7, epoch)
        expected += -(-len(packs) // 2) * min(1.0, max(0.0, epochs - epoch))
    assert count_steps(feed.plan, 2, epochs) == max(1, round(expected))
