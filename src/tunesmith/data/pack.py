"""Best-fit packing: join samples into packs of micro_batch_tokens without padding or cutting.

Best-fit decreasing (Johnson 1974; for LM training: Ding et al. 2024, "Fewer Truncations Improve Language Modeling")
over windows of shuffled samples, so that any pack may contain any sample of its window in random order.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunesmith.data.store import TokenStore

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
    rooms: list[int] = []  # distinct amounts of free room, ascending
    how_many: Counter[int] = Counter()  # free room -> packs that have it
    num_packs = 0

    def add(room: int, count: int) -> None:
        if count and not how_many[room]:
            bisect.insort(rooms, room)
        how_many[room] += count

    for length, count in sorted(Counter(lengths.tolist()).items(), reverse=True):
        if length > capacity:
            raise too_long(length, capacity)
        left = count
        while left:
            at = bisect.bisect_left(rooms, length)
            is_new = at == len(rooms)
            room = capacity if is_new else rooms[at]
            per_pack = room // length
            there = -(-left // per_pack) if is_new else how_many[room]
            full = min(there, left // per_pack)
            rest = left - full * per_pack if full < there else 0  # the rest shares one more pack
            used = full + bool(rest)
            if is_new:
                num_packs += used
            else:
                how_many[room] -= used
                if not how_many[room]:
                    del rooms[at], how_many[room]
            add(room - per_pack * length, full)
            add(room - rest * length, bool(rest))
            left -= full * per_pack + rest
    return num_packs


def too_long(length: int, capacity: int) -> ValueError:
    return ValueError(f"a sample of {length} tokens does not fit into {capacity}")


def plan_epoch(lengths: npt.NDArray[np.int64], capacity: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
    """The packs of an epoch, each an array of sample numbers; equal arguments give equal plans."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    packs = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packs += [window[pack] for pack in pack_lengths(lengths[window].tolist(), capacity)]
    return [packs[i] for i in rng.permutation(len(packs))]


def count_epoch(lengths: npt.NDArray[np.int64], capacity: int, seed: int, epoch: int) -> int:
    """len(plan_epoch(...)) for the same arguments."""
    if len(lengths) <= WINDOW:  # one window: the order changes nothing
        return count_packs(lengths, capacity)
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    windows = (lengths[order[start : start + WINDOW]] for start in range(0, len(order), WINDOW))
    return sum(count_packs(window, capacity) for window in windows)


class Documents:
    """Layout of a batch of consecutive documents, each of which attends only to itself.

    A class rather than a list, so that torch.compile does not recompile for each batch.

    Attributes:
        lens: tokens of each document, in order; their sum is the length of the batch.
    """

    __slots__ = ("lens",)

    def __init__(self, lens: list[int]) -> None:
        self.lens = lens


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Input of one forward. Labels are shifted here and nowhere else.

    Attributes:
        input_ids, position_ids: int64 [1, tokens]; positions start at 0 in each document.
        targets: int64 [targets], the tokens to predict. Never the first token of a document, which has no context.
        target_at: int64 [targets], the positions whose outputs predict them, ascending.
        layout: which tokens attend to which.
        number: of the pack in its step and of the batch in the pack, counted over all processes.
        is_empty: it is computed for the sake of other processes, and counts nothing.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    target_at: npt.NDArray[np.int64]
    layout: Documents
    number: tuple[int, int] = (0, 0)
    is_empty: bool = False

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_targets(self) -> int:
        return len(self.targets)


_NOTHING = np.zeros(0, np.int64)
EMPTY_BATCH = Batch(np.zeros((1, 2), np.int64), np.arange(2)[None], _NOTHING, _NOTHING, Documents([2]), is_empty=True)


def build_batch(
    store: TokenStore, samples: Sequence[int] | npt.NDArray[np.int64], number: tuple[int, int] = (0, 0)
) -> Batch:
    """Join samples, given by their numbers, into one batch."""
    documents = [store[int(index)] for index in samples]
    lens = [len(document.input_ids) for document in documents]
    input_ids = np.concatenate([document.input_ids for document in documents]).astype(np.int64)
    loss_mask = np.concatenate([document.loss_mask for document in documents]).astype(bool)
    loss_mask[np.cumsum([0, *lens[:-1]])] = False
    trained = np.flatnonzero(loss_mask)
    position_ids = np.concatenate([np.arange(length) for length in lens])
    return Batch(input_ids[None], position_ids[None], input_ids[trained], trained - 1, Documents(lens), number)
