"""Which samples a run trains on in each epoch, and in which packs: what a feed asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from tunesmith.plans.epoch import Numbers, PackedEpoch, count_windows, shuffle, windows_of
from tunesmith.plans.packers import LengthPacker, TreePacker
from tunesmith.plans.packing import WINDOW
from tunesmith.plans.prefixes import Prefixes, expand_units


class Plan(Protocol):
    """The packs of every epoch. They depend on the data, the capacity and the seed alone."""

    @property
    def capacity(self) -> int:
        """Tokens per pack."""

    @property
    def tokens_per_epoch(self) -> int:
        """Of the first epoch; others may have a few more or fewer. A shared token counts once in each pack."""

    def count(self, epoch: int) -> int:
        """Packs of an epoch, counted without packing."""

    def packs(self, epoch: int) -> Sequence[Numbers]:
        """Sample numbers of each pack of an epoch, in order; a window is packed when one of its packs is needed."""


class ShuffledPlan:
    """Every sample once an epoch, in random order.

    Args:
        samples: numbers of the samples to train on.
        lengths: tokens of each sample of the store, by its number.
        prefixes: of the samples, to pack them as prefix trees; samples of a row that share one then stay together.
    """

    def __init__(
        self, samples: Numbers, lengths: Numbers, capacity: int, seed: int, prefixes: Prefixes | None = None
    ) -> None:
        self.samples, self.lengths, self.capacity, self.seed = samples, lengths, capacity, seed
        self._packer = TreePacker(prefixes, capacity) if prefixes else LengthPacker(lengths, capacity)
        self._units = prefixes.units(samples) if prefixes else None
        self._counts: dict[int, Numbers] = {}  # epoch -> packs of each window

    @cached_property
    def tokens_per_epoch(self) -> int:
        if self._units is None:
            return int(self.lengths[self.samples].sum())
        return sum(map(self._packer.count_tokens, windows_of(self._shuffle(0)[0])))

    def count(self, epoch: int) -> int:
        return int(self._count(epoch).sum())

    def packs(self, epoch: int) -> Sequence[Numbers]:
        order, rng = self._shuffle(epoch)
        counts = self._count(epoch, order)
        pack_order = rng.permutation(int(counts.sum()))
        return PackedEpoch(self._packer, order, counts, pack_order)

    def _shuffle(self, epoch: int) -> tuple[Numbers, np.random.Generator]:
        units = self._units
        numbers, rng = shuffle(len(self.samples) if units is None else len(units), self.seed, epoch)
        return self.samples[numbers if units is None else expand_units(units, numbers, len(self.samples))], rng

    def _count(self, epoch: int, order: Numbers | None = None) -> Numbers:
        """Counting takes as long as reading all lengths, so it is done once an epoch.

        Args:
            order: the epoch's samples, where they are known.
        """
        if len(self.samples) <= WINDOW and self._units is None:  # one window: the order changes nothing
            epoch, order = 0, self.samples
        if epoch not in self._counts:
            self._counts[epoch] = count_windows(self._packer, self._shuffle(epoch)[0] if order is None else order)
        return self._counts[epoch]


def count_steps(plan: Plan, packs_per_step: int, epochs: float) -> int:
    """Optimizer steps of this many epochs; their numbers of packs may differ by one or two."""
    total = 0.0
    for epoch in range(math.ceil(epochs)):
        total += math.ceil(plan.count(epoch) / packs_per_step) * min(1.0, epochs - epoch)
    return max(1, round(total))
