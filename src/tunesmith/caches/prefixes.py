"""Caches of finished rows, so that a later prompt with the same beginning need not be computed from its first token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.caches.store import RowCache

WORTHWHILE = 32  # tokens; copying fewer costs about as much as computing them
_MOST = 256  # caches


@dataclass(frozen=True, slots=True)
class Kept:
    """Tokens of a finished row, and its cache of exactly these under one adapter."""

    adapter: str
    ids: Sequence[int]
    cache: RowCache


class KeptPrefixes:
    """Kept caches; the one that was used least recently leaves first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        self._next = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, kept: Kept) -> None:
        """Keep a row's cache, and drop those that are wholly a beginning of it."""
        for number, other in list(self._kept.items()):
            if other.adapter == kept.adapter and common_length(other.ids, kept.ids) == len(other.ids):
                self._drop(number)
        self._kept[self._next] = kept
        self._next += 1
        self.num_bytes += kept.cache.num_bytes
        if len(self._kept) > _MOST:
            self.drop_oldest()

    def find(self, adapter: str, ids: Sequence[int]) -> tuple[Kept, int] | None:
        """The kept cache that shares the longest worthwhile beginning with a prompt, and its length."""
        best, length = None, WORTHWHILE - 1
        for number, kept in self._kept.items():
            if kept.adapter == adapter and (shared := common_length(kept.ids, ids)) > length:
                best, length = number, shared
        if best is None:
            return None
        self._kept.move_to_end(best)
        return self._kept[best], length

    def drop_oldest(self) -> None:
        self._drop(next(iter(self._kept)))

    def _drop(self, number: int) -> None:
        self.num_bytes -= self._kept.pop(number).cache.num_bytes


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of equal first elements of two lists."""
    low, high = 0, min(len(one), len(other))
    if one[:WORTHWHILE] != other[:WORTHWHILE]:
        high = min(high, WORTHWHILE)
    while low < high:  # one[:low] equals other[:low]
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
