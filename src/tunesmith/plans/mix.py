"""Sources mixed by shares of tokens: each in its own endless random order, interleaved in proportion.

A pass over the mix takes a quota of tokens from each source. The samples of a source lie one after another on a line of
tokens; pass p takes those that start in [p * quota, (p + 1) * quota), and they are interleaved by how far into the
quota they start. So at any point of a pass, every source has given its share, up to one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tunesmith.plans.epoch import Numbers, PackedEpoch, count_windows, windows_of
from tunesmith.plans.packers import LengthPacker, TreePacker
from tunesmith.plans.prefixes import Prefixes, expand_units

_ORDER, _ARRANGE = 0x50C, 0xA11  # generators of a source's orders, and of the order of a window's packs
_CANDIDATES = 64  # packs among which the next one is chosen


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """The sources of training data.

    Attributes:
        names: of the sources.
        source_of: int16 [samples of the store], the source of each.
        quotas: tokens of each source in a pass; None: all rows of all sources once, in one random order.
    """

    names: tuple[str, ...]
    source_of: npt.NDArray[np.int16]
    quotas: tuple[Fraction, ...] | None = None

    @property
    def size(self) -> int:
        return len(self.names)


def exact(number: float) -> Fraction:
    """The number as it is written: 0.1 is one tenth."""
    return Fraction(str(number))


def quotas_by_weight(tokens: Sequence[int], weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Tokens of each source in a pass that ends when the first source is used up.

    >>> quotas_by_weight([1000, 600], [1, 3])
    (Fraction(200, 1), Fraction(600, 1))
    """
    exacts = [exact(weight) for weight in weights]
    length = min(Fraction(total) / weight for total, weight in zip(tokens, exacts, strict=True))
    return tuple(weight * length for weight in exacts)


def quotas_by_epochs(tokens: Sequence[int], epochs: Sequence[float]) -> tuple[Fraction, ...]:
    """Tokens of each source in a pass that takes it so many times."""
    return tuple(total * exact(times) for total, times in zip(tokens, epochs, strict=True))


class SourceLine:
    """The endless order of one source: all of its samples in random order, again and again.

    A pass of at most one cycle never has a sample twice: a cycle that begins within a pass ends with the samples which
    that pass has had already.

    Args:
        samples: numbers of the source's samples.
        lengths: tokens of each sample of the store, by its number.
        quota: tokens of a pass.
        seed: of the source's orders.
        units: where samples begin that stay together in these orders; None: each alone.
    """

    def __init__(
        self, samples: Numbers, lengths: Numbers, quota: Fraction, seed: Sequence[int], units: Numbers | None = None
    ) -> None:
        self._samples, self._lengths, self._quota, self._seed = samples, lengths, quota, seed
        self._units = np.arange(len(samples)) if units is None else units
        self.tokens = int(lengths[samples].sum())
        self._cycle = -1

    def take(self, number: int) -> tuple[Numbers, Numbers]:
        """The samples of a pass in order, and where each starts: tokens from the start of the pass."""
        first, last = self._bound(number), self._bound(number + 1)
        taken, starts = [self._samples[:0]], [np.zeros(0, np.int64)]  # a small quota may hold no start of a sample
        cycle = first // self.tokens
        while cycle * self.tokens < last:
            order, begins = self._reach(cycle)
            begins = begins + (cycle * self.tokens - first)
            low, high = np.searchsorted(begins, [0, last - first])
            taken.append(order[low:high])
            starts.append(begins[low:high])
            cycle += 1
        return np.concatenate(taken), np.concatenate(starts)

    def _bound(self, number: int) -> int:
        """The first token of a pass; a sample that starts at or after it belongs to the pass."""
        return -int(-number * self._quota // 1)

    def _reach(self, cycle: int) -> tuple[Numbers, Numbers]:
        """The order of a cycle, and where each sample starts in it. Each cycle depends on the one before."""
        if cycle < self._cycle:
            self._cycle = -1
        while self._cycle < cycle:
            self._cycle += 1
            units = np.random.default_rng([*self._seed, self._cycle]).permutation(len(self._units))
            order = self._samples[expand_units(self._units, units, len(self._samples))]
            if self._cycle and self._quota <= self.tokens:
                order = self._put_last(order)
            ends = np.cumsum(self._lengths[order], dtype=np.int64)
            self._order, self._begins = order, ends - self._lengths[order]
        return self._order, self._begins

    def _put_last(self, order: Numbers) -> Numbers:
        """A new cycle's order, with the samples last that the pass it begins in has had from the cycle before."""
        begin = self._cycle * self.tokens
        number = int(begin // self._quota)  # the pass that holds the first token of the cycle
        had = self._order[np.searchsorted(self._begins, self._bound(number) - (begin - self.tokens)) :]
        is_late = np.isin(order, had)
        return np.concatenate([order[~is_late], order[is_late]])


class MixedPlan:
    """Passes over a mix: samples interleaved by the shares of their sources, then packed window by window.

    The packs of a window are put in an order in which the sources keep their shares from step to step; windows follow
    one another.

    Args:
        samples: numbers of the samples to train on.
        lengths: tokens of each sample of the store, by its number.
        mix: with quotas.
        prefixes: of the samples, to pack them as prefix trees; samples of a row that share one then stay together. The
            shares of the sources count the tokens of all samples, shared or not.
    """

    def __init__(
        self, samples: Numbers, lengths: Numbers, mix: Mix, capacity: int, seed: int, prefixes: Prefixes | None = None
    ) -> None:
        assert mix.quotas is not None
        self.lengths, self.mix, self.capacity, self.seed = lengths, mix, capacity, seed
        self._quotas, self._is_shared = mix.quotas, prefixes is not None
        self._packer = TreePacker(prefixes, capacity) if prefixes else LengthPacker(lengths, capacity)
        sources = mix.source_of[samples]
        self._lines = []
        for number, quota in enumerate(mix.quotas):
            own = samples[sources == number]
            units = prefixes.units(own) if prefixes else None
            self._lines.append(SourceLine(own, lengths, quota, (seed, _ORDER, number), units))
        self._counts: dict[int, Numbers] = {}

    @cached_property
    def tokens_per_epoch(self) -> int:
        if not self._is_shared:
            return round(sum(self._quotas))
        return sum(map(self._packer.count_tokens, windows_of(self.order(0))))

    def count(self, epoch: int) -> int:
        return int(self._count(epoch).sum())

    def packs(self, epoch: int) -> Sequence[Numbers]:
        order = self.order(epoch)
        counts = self._count(epoch, order)

        def arrange(window: int, packs: list[Numbers]) -> list[Numbers]:
            return self._arrange(packs, (self.seed, _ARRANGE, epoch, window))

        return PackedEpoch(self._packer, order, counts, arrange=arrange)

    def _count(self, epoch: int, order: Numbers | None = None) -> Numbers:
        if epoch not in self._counts:
            self._counts[epoch] = count_windows(self._packer, self.order(epoch) if order is None else order)
        return self._counts[epoch]

    def order(self, epoch: int) -> Numbers:
        """The samples of a pass, interleaved."""
        taken = [line.take(epoch) for line in self._lines]
        keys = [starts / float(quota) for (_, starts), quota in zip(taken, self._quotas, strict=True)]
        merged: Numbers = np.concatenate([samples for samples, _ in taken])
        return merged[np.argsort(np.concatenate(keys), kind="stable")]

    def _arrange(self, packs: list[Numbers], seed: Sequence[int]) -> list[Numbers]:
        """The packs in a random order in which the tokens so far are always near the shares of the sources."""
        flat = np.concatenate(packs)
        owner = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
        tokens = np.zeros((len(packs), self.mix.size))
        np.add.at(tokens, (owner, self.mix.source_of[flat]), self.lengths[flat])
        share = tokens.sum(0) / tokens.sum()
        surplus = tokens - tokens.sum(1, keepdims=True) * share
        waiting = np.random.default_rng(seed).permutation(len(packs))
        candidates, rest = waiting[:_CANDIDATES].copy(), iter(waiting[_CANDIDATES:].tolist())
        state, arranged = np.zeros(self.mix.size), []
        for _ in packs:
            best = int(np.argmin(((state + surplus[candidates]) ** 2).sum(1)))
            chosen = int(candidates[best])
            arranged.append(packs[chosen])
            state += surplus[chosen]
            if (after := next(rest, None)) is None:
                candidates = np.delete(candidates, best)
            else:
                candidates[best] = after
        return arranged
