"""Best-fit packing: join samples into packs of micro_batch_tokens without padding or cutting.

Best-fit decreasing (Johnson 1974; for LM training: Ding et al. 2024, "Fewer Truncations Improve Language Modeling")
over windows of shuffled samples, so that any pack may contain any sample of its window in random order.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WINDOW = 8192  # samples packed together; over 99 % fill, and still fast


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped into packs whose lengths add up to at most `capacity`.

    Each item goes into the fullest pack that still has room for it, longest items first.

    >>> pack_lengths([3, 9, 7, 1], 10)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    packs: list[list[int]] = []
    rooms: list[int] = []  # distinct amounts of free room, ascending
    packs_with: dict[int, list[int]] = {}  # free room -> packs that have it
    for index in order:
        length = lengths[index]
        if length > capacity:
            raise too_long(length, capacity)
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del packs_with[room], rooms[at]
        packs[pack].append(index)
        left = room - length
        if left not in packs_with:
            bisect.insort(rooms, left)
            packs_with[left] = []
        packs_with[left].append(pack)
    return packs


def count_packs(lengths: npt.NDArray[np.int64], capacity: int) -> int:
    """len(pack_lengths(lengths, capacity)), computed from the count of each length, without placing samples one by one.

    If several items of one length fit into a pack, they go there together: after the first one the pack has less room
    than before, so it is still the fullest one that fits.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise too_long(int(lengths.max()), capacity)
    counts = np.bincount(lengths) if len(lengths) else lengths
    found = np.flatnonzero(counts)[::-1]
    rooms: list[int] = []  # distinct amounts of free room, ascending
    how_many = [0] * (capacity + 1)  # free room -> packs that have it
    num_packs = 0
    insort, bisect_left = bisect.insort, bisect.bisect_left
    for length, left in zip(found.tolist(), counts[found].tolist(), strict=True):
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):  # only new packs have room
                room, per_pack = capacity, capacity // length
                full, rest = divmod(left, per_pack)  # the rest shares one more pack
                num_packs += full + bool(rest)
                left = 0
            else:
                room = rooms[at]
                per_pack = room // length
                there = how_many[room]
                full = left // per_pack
                if full >= there:
                    full, rest = there, 0
                else:
                    rest = left - full * per_pack
                used = full + bool(rest)
                if used == there:
                    del rooms[at]
                how_many[room] = there - used
                left -= full * per_pack + rest
            if full:
                after = room - per_pack * length
                if not how_many[after]:
                    insort(rooms, after)
                how_many[after] += full
            if rest:
                after = room - rest * length
                if not how_many[after]:
                    insort(rooms, after)
                how_many[after] += 1
    return num_packs


def too_long(length: int, capacity: int) -> ValueError:
    return ValueError(f"a sample of {length} tokens does not fit into {capacity}")
