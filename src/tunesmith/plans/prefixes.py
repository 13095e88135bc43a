"""What samples share at their beginnings: their order by prefixes, found in one pass over the shared tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tunesmith.plans.tree import MIN_SHARED

Numbers = npt.NDArray[np.int64]
_CHUNK = 1 << 16  # samples that are compared at once
_FEW, _MANY = 8, 64  # tokens of each that are compared at once: where samples part, and where they do not
_FACTORS = np.random.default_rng(0).integers(1, 1 << 63, MIN_SHARED, np.uint64) | np.uint64(1)


class Tokens(Protocol):
    """Samples one after another, as `TokenStore` has them."""

    @property
    def shards(self) -> Sequence[tuple[npt.NDArray[np.uint32], Any]]: ...
    @property
    def shard_starts(self) -> Numbers: ...
    @property
    def offsets(self) -> Numbers: ...


@dataclass(frozen=True, slots=True, eq=False)
class Prefixes:
    """The order of some samples in which those with a common prefix are neighbours.

    Attributes:
        rank: int64 [samples of the store], the place of each in the order; -1: not among them.
        shared: int64 [ranks], tokens that a sample shares with the one before it; 0 where fewer than MIN_SHARED. Two
            samples share the least of what neighbours between them share.
        lengths: int64 [samples of the store], tokens of each.
        families: int64 [ranks], equal where MIN_SHARED tokens are.
        row_ids: int64 [samples of the store], equal for the samples of one row.
    """

    rank: Numbers
    shared: Numbers
    lengths: Numbers
    families: Numbers
    row_ids: Numbers

    def sort(self, samples: Numbers) -> tuple[Numbers, Numbers]:
        """Places of samples in the order by prefixes, and the tokens each shares with the one before it there."""
        ranks = self.rank[samples]
        places = np.argsort(ranks, kind="stable")
        ranks = ranks[places]
        shared: Numbers = self.lengths[samples[places]].astype(np.int64)  # of a sample that is given again
        shared[shared < MIN_SHARED] = 0
        is_new = np.ones(len(ranks), bool)
        is_new[1:] = ranks[1:] != ranks[:-1]
        distinct = ranks[is_new]
        least = np.zeros(len(distinct), np.int64)
        if len(distinct) > 1:
            between = self.shared[distinct[0] + 1 : distinct[-1] + 1]
            least[1:] = np.minimum.reduceat(between, distinct[:-1] - distinct[0])
        shared[is_new] = least
        return places, shared

    def among(self, samples: Numbers) -> Prefixes:
        """The prefixes of some samples, numbered as they are given: counting costs what these few cost."""
        places, shared = self.sort(samples)
        rank = np.empty(len(samples), np.int64)
        rank[places] = np.arange(len(samples))
        return Prefixes(rank, shared, self.lengths[samples], np.cumsum(shared == 0), self.row_ids[samples])

    def fresh(self, samples: Numbers) -> Numbers:
        """Tokens of each sample of a pack that are computed for it; for the others, another one has them."""
        places, shared = self.sort(samples)
        fresh: Numbers = self.lengths[samples].astype(np.int64)
        fresh[places] -= shared
        return fresh

    def count(self, samples: Numbers) -> int:
        """Tokens of the prefix trees of a pack."""
        return int(self.fresh(samples).sum())

    def units(self, samples: Numbers) -> Numbers:
        """Where, among samples in the order of the store, those begin that share nothing with the sample before them
        in their row: what is shuffled."""
        rows, families = self.row_ids[samples], self.families[self.rank[samples]]
        begins = np.ones(len(samples), bool)
        begins[1:] = (rows[1:] != rows[:-1]) | (families[1:] != families[:-1])
        return np.flatnonzero(begins)


def expand_units(units: Numbers, order: Numbers, num_samples: int) -> Numbers:
    """Places of samples when units of consecutive ones are put in another order.

    >>> expand_units(np.array([0, 2, 3]), np.array([2, 0, 1]), 5)
    array([3, 4, 0, 1, 2])
    """
    sizes = np.diff(units, append=num_samples)[order]
    return _ranges(units[order], sizes)


def _ranges(starts: Numbers, sizes: Numbers) -> Numbers:
    """start, start + 1, ... of each, one after another."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(total)


def find_prefixes(store: Tokens, samples: Numbers, row_ids: Numbers) -> Prefixes:
    """Sort samples by their prefixes.

    Samples are parted by the token in which they first differ, all groups at once. A sample that shares nothing costs
    its first MIN_SHARED tokens, others the tokens that they share.
    """
    lengths = np.diff(store.offsets)
    order, begins, ends = _group_by_first(store, samples, lengths)
    shared = np.zeros(len(order), np.int64)
    depths = np.zeros(len(begins), np.int64)
    width = MIN_SHARED
    while len(begins):
        sizes = ends - begins
        places, group = _ranges(begins, sizes), np.repeat(np.arange(len(begins)), sizes)
        same = _compare(store, order[places], order[begins][group], depths[group], width)
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        least = np.minimum.reduceat(same, first)
        depths += least
        parts = least < width
        width = _FEW if parts.mean() > 0.5 else _MANY
        new = _part(store, order, shared, places[parts[group]], group[parts[group]], depths)
        begins, ends, depths = (
            np.concatenate([old[~parts], more])
            for old, more in zip((begins, ends, depths), new, strict=True)
        )  # fmt: skip
    shared[shared < MIN_SHARED] = 0
    rank = np.full(len(lengths), -1, np.int64)
    rank[order] = np.arange(len(order))
    return Prefixes(rank, shared, lengths, np.cumsum(shared == 0), row_ids)


def _group_by_first(store: Tokens, samples: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """The samples ordered by a hash of their first MIN_SHARED tokens; where groups of several begin and end."""
    hashes = np.zeros(len(samples), np.uint64)
    for start in range(0, len(samples), _CHUNK):
        part = samples[start : start + _CHUNK]
        block = _read(store, part, np.zeros(len(part), np.int64), MIN_SHARED).astype(np.uint64)
        hashes[start : start + _CHUNK] = (block * _FACTORS).sum(1, dtype=np.uint64)
    is_long = lengths[samples] >= MIN_SHARED
    places = np.argsort(hashes, kind="stable")
    places = np.concatenate([places[is_long[places]], places[~is_long[places]]])
    found = hashes[places[: int(is_long.sum())]]
    bounds = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]])) if len(found) else np.zeros(0, np.int64)
    ends = np.append(bounds[1:], len(found))[: len(bounds)]
    several = ends - bounds > 1
    return samples[places], bounds[several], ends[several]


def _compare(store: Tokens, samples: Numbers, leaders: Numbers, depths: Numbers, width: int) -> Numbers:
    """Of each sample, how many of the next tokens it has in common with another one: at most `width`."""
    counts = np.empty(len(samples), np.int64)
    for start in range(0, len(samples), _CHUNK):
        part = slice(start, start + _CHUNK)
        own = _read(store, samples[part], depths[part], width)
        other = _read(store, leaders[part], depths[part], width)
        differs = (own != other) | (own == 0)
        counts[part] = np.where(differs.any(1), differs.argmax(1), width)
    return counts


def _part(
    store: Tokens, order: Numbers, shared: Numbers, places: Numbers, group: Numbers, depths: Numbers
) -> tuple[Numbers, Numbers, Numbers]:
    """Part groups, whose samples have `depths` tokens in common, by the next token; `order` and `shared` are changed.

    Returns:
        Where new groups of several samples begin and end, and their depths.
    """
    members = order[places]
    key = np.concatenate(
        [np.zeros(0, np.uint32)]
        + [
            _read(store, members[at : at + _CHUNK], depths[group[at : at + _CHUNK]], 1)[:, 0]
            for at in range(0, len(members), _CHUNK)
        ]
    )
    turn = np.lexsort((key, group))
    order[places], key = members[turn], key[turn]
    begins_group = np.ones(len(key), bool)
    begins_group[1:] = group[1:] != group[:-1]
    begins = begins_group.copy()
    begins[1:] |= (key[1:] != key[:-1]) | (key[1:] == 0)
    inner = begins & ~begins_group
    shared[places[inner]] = depths[group[inner]]
    starts = np.flatnonzero(begins)
    sizes = np.diff(starts, append=len(key))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    return places[starts], places[starts] + sizes, depths[group[starts]] + 1


def _read(store: Tokens, samples: Numbers, depths: Numbers, width: int) -> npt.NDArray[np.uint32]:
    """[samples, width] of the ids from a depth on, plus 1; 0 behind the end of a sample."""
    starts, block = store.offsets[samples] + depths, np.zeros((len(samples), width), np.uint32)
    left = store.offsets[samples + 1] - starts
    shard_of = np.searchsorted(store.shard_starts, store.offsets[samples], side="right") - 1
    for shard in np.unique(shard_of[left > 0]):
        tokens = store.shards[int(shard)][0]
        here = np.flatnonzero((shard_of == shard) & (left > 0))
        at = (starts[here] - store.shard_starts[shard])[:, None] + np.arange(width)
        found = tokens[np.minimum(at, len(tokens) - 1)] + np.uint32(1)
        found[np.arange(width) >= left[here][:, None]] = 0
        block[here] = found
    return block
