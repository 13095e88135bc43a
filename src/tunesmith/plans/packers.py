"""How the samples of a window become packs: by their lengths, or by the prefix trees that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tunesmith.plans.packing import count_packs, pack_lengths, too_long
from tunesmith.plans.prefixes import Prefixes
from tunesmith.plans.tree import count_before

Numbers = npt.NDArray[np.int64]
MIN_GROUPED = 32  # shorter prefixes are shared where samples meet, but do not bring them together


class Packer(Protocol):
    """Both depend on the samples and their order alone."""

    @property
    def capacity(self) -> int:
        """Tokens that fit into a pack."""

    def pack(self, samples: Numbers) -> list[Numbers]:
        """The packs of a window."""

    def count(self, samples: Numbers) -> int:
        """How many packs there are."""

    def count_tokens(self, samples: Numbers) -> int:
        """Tokens of all packs together; a shared one counts once in each pack."""


class LengthPacker:
    """Args:
    lengths: tokens of each sample of the store, by its number.
    """

    def __init__(self, lengths: Numbers, capacity: int) -> None:
        self._lengths, self.capacity = lengths, capacity

    def pack(self, samples: Numbers) -> list[Numbers]:
        return [samples[pack] for pack in pack_lengths(self._lengths[samples].tolist(), self.capacity)]

    def count(self, samples: Numbers) -> int:
        return count_packs(self._lengths[samples], self.capacity)

    def count_tokens(self, samples: Numbers) -> int:
        return int(self._lengths[samples].sum())


@dataclass(slots=True)
class _Family:
    """Samples with a common prefix, as long as more of them are found.

    Attributes:
        depth: tokens that all of them share.
        first_depth: tokens that the first two share; a family may lose fewer than MIN_GROUPED of them.
        items: what is packed as one, each with the tokens of its tree.
    """

    depth: int
    first_depth: int
    items: list[tuple[list[int], int]]


class TreePacker:
    """Packs of prefix trees: samples that share a prefix come together, and what they share takes room once.

    Samples with a common prefix make a family; families are within families. From the innermost on, a family that fits
    into a pack stays whole; a larger one is packed, each pack with the common prefix once. What the families are in
    the end is packed as samples are. Copies of a sample, as a mix may have them in a window, are packed as if they
    shared nothing: together they would be one update of several times the weight.
    """

    def __init__(self, prefixes: Prefixes, capacity: int) -> None:
        self._prefixes, self.capacity = prefixes, capacity

    def pack(self, samples: Numbers) -> list[Numbers]:
        return [samples[places] for places in self._pack(samples)]

    def _pack(self, samples: Numbers) -> list[Numbers]:
        items = self._items(samples)
        packs = pack_lengths([tokens for _, tokens in items], self.capacity)
        return [np.array([place for item in pack for place in items[item][0]]) for pack in packs]

    def count(self, samples: Numbers) -> int:
        return count_packs(np.array([tokens for _, tokens in self._items(samples)], np.int64), self.capacity)

    def count_tokens(self, samples: Numbers) -> int:
        window = self._prefixes.among(samples)
        return sum(window.count(places) for places in self._pack(samples))

    def _items(self, samples: Numbers) -> list[tuple[list[int], int]]:
        """What is packed as one: places of samples, and the tokens of their tree, or a few more; at most `capacity`."""
        lengths = self._prefixes.lengths[samples]
        if len(samples) and int(lengths.max()) > self.capacity:
            raise too_long(int(lengths.max()), self.capacity)
        times = count_before(samples)
        items = []
        for time in range(int(times.max()) + 1 if len(times) else 0):
            items += self._families(samples, np.flatnonzero(times == time))
        return sorted(items)

    def _families(self, samples: Numbers, own: Numbers) -> list[tuple[list[int], int]]:
        """The items of the samples at these places, of which none is there twice."""
        order, shared = self._prefixes.sort(samples[own])
        places, lengths = own[order], self._prefixes.lengths[samples[own[order]]]
        root = _Family(0, 0, [])
        open_families = [root]
        for place, length, common in zip(places.tolist(), lengths.tolist(), shared.tolist(), strict=True):
            self._close(open_families, common)
            family = open_families[-1]
            if common >= family.depth + MIN_GROUPED:  # with the sample before it, or the family it is in
                family = _Family(common, common, [family.items.pop()])
                open_families.append(family)
            family.items.append(([place], length))
        self._close(open_families, -MIN_GROUPED)
        return root.items

    def _close(self, families: list[_Family], common: int) -> None:
        """Close the families that share more than `common` tokens."""
        while len(families) > 1 and families[-1].depth > common:
            last, is_inner = families[-1], common >= families[-2].depth + MIN_GROUPED
            if is_inner and common > last.first_depth - MIN_GROUPED:
                last.depth = common
                return
            families.pop()
            if is_inner:
                families.append(_Family(common, common, self._split(last)))
                return
            families[-1].items += self._split(last)

    def _split(self, family: _Family) -> list[tuple[list[int], int]]:
        """The family as one item, or as several with the common prefix in each."""
        depth, items = family.depth, family.items
        if depth + sum(tokens - depth for _, tokens in items) <= self.capacity:
            return [_join(items, depth)]
        items = sorted(items)  # as they were drawn
        packs = pack_lengths([tokens - depth for _, tokens in items], self.capacity - depth)
        return [_join([items[item] for item in pack], depth) for pack in packs]


def _join(items: list[tuple[list[int], int]], depth: int) -> tuple[list[int], int]:
    places = sorted(place for own, _ in items for place in own)
    return places, depth + sum(tokens - depth for _, tokens in items)
