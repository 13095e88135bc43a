"""Which samples a run trains on in each epoch, and in which packs: what a feed asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from tunesmith.plans.epoch import Numbers, PackedEpoch, count_windows, shuffle
from tunesmith.plans.packing import WINDOW


class Plan(Protocol):
    """The packs of every epoch. They depend on the data, the capacity and the seed alone."""

    @property
    def capacity(self) -> int:
        """Tokens per pack."""

    @property
    def tokens_per_epoch(self) -> int:
        """Of the first epoch; a mix may have a few more or fewer in others."""

    def count(self, epoch: int) -> int:
        """Packs of an epoch, counted without packing."""

    def packs(self, epoch: int) -> Sequence[Numbers]:
        """Sample numbers of each pack of an epoch, in order; a window is packed when one of its packs is needed."""


class ShuffledPlan:
    """Every sample once an epoch, in random order.

    Args:
        samples: numbers of the samples to train on.
        lengths: tokens of each sample of the store, by its number.
    """

    def __init__(self, samples: Numbers, lengths: Numbers, capacity: int, seed: int) -> None:
        self.samples, self.lengths, self.capacity, self.seed = samples, lengths, capacity, seed
        self._counts: dict[int, Numbers] = {}  # epoch -> packs of each window

    @property
    def tokens_per_epoch(self) -> int:
        return int(self.lengths[self.samples].sum())

    def count(self, epoch: int) -> int:
        return int(self._count(epoch).sum())

    def packs(self, epoch: int) -> Sequence[Numbers]:
        numbers, rng = shuffle(len(self.samples), self.seed, epoch)
        order = self.samples[numbers]
        counts = self._count(epoch, order)
        pack_order = rng.permutation(int(counts.sum()))
        return PackedEpoch(self.lengths, order, self.capacity, counts, pack_order)

    def _count(self, epoch: int, order: Numbers | None = None) -> Numbers:
        """Counting takes as long as reading all lengths, so it is done once an epoch.

        Args:
            order: the epoch's samples, where they are known.
        """
        if len(self.samples) <= WINDOW:  # one window: the order changes nothing
            epoch, order = 0, self.samples
        if epoch not in self._counts:
            if order is None:
                order = self.samples[shuffle(len(self.samples), self.seed, epoch)[0]]
            self._counts[epoch] = count_windows(self.lengths, order, self.capacity)
        return self._counts[epoch]


def count_steps(plan: Plan, packs_per_step: int, epochs: float) -> int:
    """Optimizer steps of this many epochs; their numbers of packs may differ by one or two."""
    total = 0.0
    for epoch in range(math.ceil(epochs)):
        total += math.ceil(plan.count(epoch) / packs_per_step) * min(1.0, epochs - epoch)
    return max(1, round(total))
