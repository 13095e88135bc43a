"""Prefix trees: samples that begin with the same tokens, with each shared token computed once.

A tree is laid out as strands: a strand is a whole sample, or what a sample adds to one before it. A strand continues
another one behind some token of it, its anchor. The longest samples come first, so that a row unrolled turn by turn has
one strand of its last sample, and one for each reply that the last sample does not hold.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
MIN_SHARED = 16  # shorter prefixes cost more to share than to compute again


class Tree:
    """Layout of a batch that is a forest of prefix trees: a token attends to its ancestors and to itself.

    In preorder: what descends from a token lies in one piece, from the token itself on. A class rather than lists, as
    `Documents` is.

    Attributes:
        lens: tokens of each strand, in order; their sum is the length of the batch.
        anchors: of each strand, the position of the token that it continues; -1 for the first tokens of a tree.
        copies: positions of the tokens of all samples, one sample after another, as if nothing were shared.
        sample_lens: tokens of each sample.
    """

    __slots__ = ("anchors", "copies", "lens", "sample_lens")

    def __init__(self, lens: list[int], anchors: list[int], copies: Ids, sample_lens: list[int]) -> None:
        self.lens, self.anchors = lens, anchors
        self.copies, self.sample_lens = copies, sample_lens

    def spans(self) -> tuple[Ids, Ids]:
        """For each token, the end of what descends from it, and its depth."""
        starts = np.cumsum([0, *self.lens])
        ends, depths = np.repeat(starts[1:], self.lens), np.arange(starts[-1]) - np.repeat(starts[:-1], self.lens)
        for strand, anchor in enumerate(self.anchors):
            if anchor >= 0:
                depths[starts[strand] : starts[strand + 1]] += depths[anchor] + 1
        sizes = np.array(self.lens)  # of strands with what is below them, which comes after them
        for strand in reversed(range(len(self.anchors))):
            if (anchor := self.anchors[strand]) >= 0:
                above = int(np.searchsorted(starts, anchor, side="right")) - 1
                upper = ends[starts[above] : anchor + 1]
                np.maximum(upper, ends[starts[strand]], out=upper)
                sizes[above] += sizes[strand]
        assert (ends[starts[:-1]] - starts[:-1] == sizes).all(), "the strands of a tree lie in preorder"
        return ends, depths

    def paths(self) -> list[list[tuple[int, int]]]:
        """Of each strand, the pieces [start, stop) of the batch that it continues, from the root on."""
        starts = [0, *np.cumsum(self.lens).tolist()]
        paths: list[list[tuple[int, int]]] = []
        for anchor in self.anchors:
            if anchor < 0:
                paths.append([])
                continue
            parent = bisect.bisect_right(starts, anchor) - 1
            paths.append([*paths[parent], (starts[parent], anchor + 1)])
        return paths


@dataclass(frozen=True, slots=True, eq=False)
class JoinedSamples:
    """Samples joined into prefix trees.

    Attributes:
        input_ids, position_ids: int64 [tokens]; a position is a depth in the tree.
        places: for each sample, in the order given, the positions of its tokens in the batch.
    """

    input_ids: Ids
    position_ids: Ids
    layout: Tree
    places: list[Ids]


Path = list[tuple[int, int]]  # (strand, tokens of it), from the root on


def build_tree(samples: Sequence[npt.NDArray[np.integer]], min_shared: int = MIN_SHARED) -> JoinedSamples:
    """Join samples, each of at least one token, into prefix trees.

    Args:
        min_shared: shorter common prefixes are not shared.
    """
    ranked, shared = rank_samples(samples)
    lens: list[int] = []
    anchors: list[tuple[int, int]] = []  # (strand, offset in it) of the token that a strand continues
    owners: list[int] = []  # the sample that has the whole strand, from the strand's depth on
    paths: list[Path] = [[] for _ in samples]
    placed: list[int] = []  # ranks of the samples so far, ascending
    for rank in sorted(range(len(ranked)), key=lambda rank: -len(samples[ranked[rank]])):
        sample = ranked[rank]
        length, other = _nearest(rank, placed, shared)
        length = length if length >= min_shared else 0
        path = _cut(paths[ranked[other]], length) if length else []
        if (fresh := len(samples[sample]) - length) > 0:
            anchors.append((path[-1][0], path[-1][1] - 1) if path else (-1, 0))
            path.append((len(lens), fresh))
            lens.append(fresh)
            owners.append(sample)
        paths[sample] = path
        bisect.insort(placed, rank)
    order, starts = _preorder(lens, anchors)
    places = [np.concatenate([np.arange(starts[strand], starts[strand] + n) for strand, n in path]) for path in paths]
    input_ids, position_ids = np.empty(sum(lens), np.int64), np.empty(sum(lens), np.int64)
    for strand, sample in enumerate(owners):
        own = slice(starts[strand], starts[strand] + lens[strand])
        depth = len(samples[sample]) - lens[strand]
        input_ids[own], position_ids[own] = samples[sample][depth:], np.arange(depth, depth + lens[strand])
    layout = Tree(
        [lens[strand] for strand in order],
        [starts[above] + offset if (above := anchors[strand][0]) >= 0 else -1
         for strand in order for offset in (anchors[strand][1],)],
        np.concatenate(places), [len(place) for place in places],
    )  # fmt: skip
    return JoinedSamples(input_ids, position_ids, layout, places)


def rank_samples(samples: Sequence[npt.NDArray[np.integer]]) -> tuple[list[int], list[int]]:
    """Numbers of the samples in the order of their ids, and how many tokens each shares with the one before it.

    Two samples share the least of what neighbours between them share.
    """
    keys = [np.asarray(sample).astype(">u4").tobytes() for sample in samples]  # ordered as the ids are
    ranked = sorted(range(len(samples)), key=keys.__getitem__)
    return ranked, [
        common_prefix(samples[before], samples[sample]) if place else 0
        for place, (before, sample) in enumerate(zip([ranked[0], *ranked], ranked, strict=False))
    ]


def common_prefix(one: npt.NDArray[np.integer], two: npt.NDArray[np.integer]) -> int:
    """Number of tokens with which both begin."""
    length = min(len(one), len(two))
    different = one[:length] != two[:length]
    return int(different.argmax()) if different.any() else length


def _nearest(rank: int, placed: list[int], shared: list[int]) -> tuple[int, int]:
    """The longest prefix shared with a placed sample, and the rank of that."""
    at = bisect.bisect(placed, rank)
    left = (min(shared[placed[at - 1] + 1 : rank + 1]), placed[at - 1]) if at else (0, -1)
    right = (min(shared[rank + 1 : placed[at] + 1]), placed[at]) if at < len(placed) else (0, -1)
    return max(left, right)


def _cut(path: Path, length: int) -> Path:
    """The first tokens of a path."""
    cut: Path = []
    for strand, tokens in path:
        cut.append((strand, min(tokens, length)))
        length -= cut[-1][1]
        if not length:
            break
    return cut


def _preorder(lens: list[int], anchors: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Strands in preorder, those that continue later tokens of a strand first; and where each strand begins."""
    children: dict[int, list[int]] = {}
    for strand, (above, _) in enumerate(anchors):
        children.setdefault(above, []).append(strand)
    waiting, order = list(reversed(children.get(-1, []))), []
    starts, end = [0] * len(lens), 0
    while waiting:
        strand = waiting.pop()
        order.append(strand)
        starts[strand], end = end, end + lens[strand]
        waiting += sorted(children.get(strand, []), key=lambda child: anchors[child][1])
    return order, starts


def count_before(numbers: Ids) -> Ids:
    """How often each number is there before its place.

    >>> count_before(np.array([4, 7, 4, 4]))
    array([0, 0, 1, 2])
    """
    order = np.argsort(numbers, kind="stable")
    first = np.searchsorted(numbers[order], numbers[order])
    counts = np.empty(len(numbers), np.int64)
    counts[order] = np.arange(len(numbers)) - first
    return counts
