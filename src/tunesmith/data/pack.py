"""Best-fit packing: samples joined to packs of at most micro_batch_tokens, without padding and without cutting.

Best-fit decreasing (Johnson 1974; for LM training: Ding et al. 2024, "Fewer Truncations Improve Language Modeling")
over windows of shuffled samples, so that any pack may hold any sample and the order is random between windows.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunesmith.data.store import TokenStore

IGNORE_INDEX = -100
_WINDOW = 8192  # samples packed together; large enough for over 99 % fill, small enough to be quick


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
            raise ValueError(f"a sample of {length} tokens does not fit into {capacity}")
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


def plan_epoch(lengths: npt.NDArray[np.int64], capacity: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
    """The packs of an epoch, each an array of sample numbers; the same arguments give the same plan."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    packs = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        packs += [window[pack] for pack in pack_lengths(lengths[window].tolist(), capacity)]
    return [packs[i] for i in rng.permutation(len(packs))]


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Documents one behind another, as one forward takes them.

    Attributes:
        input_ids, position_ids, labels: int64 [1, tokens]; positions start anew with each document; labels are
            unshifted, IGNORE_INDEX where nothing is trained and at each document's first token, which has no
            context to be predicted from.
        doc_lens: tokens of each document.
        samples: the sample numbers in it.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    doc_lens: list[int]
    samples: list[int]

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


def build_batch(store: TokenStore, pack: Sequence[int] | npt.NDArray[np.int64]) -> PackedBatch:
    """Join the samples of one pack."""
    samples = [store[int(index)] for index in pack]
    doc_lens = [len(sample.input_ids) for sample in samples]
    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    loss_mask = np.concatenate([sample.loss_mask for sample in samples]).astype(bool)
    loss_mask[np.cumsum([0, *doc_lens[:-1]])] = False
    labels = np.where(loss_mask, input_ids, IGNORE_INDEX)
    position_ids = np.concatenate([np.arange(length) for length in doc_lens])
    return PackedBatch(input_ids[None], position_ids[None], labels[None], doc_lens, [int(i) for i in pack])


def build_batches(
    store: TokenStore, packs: Sequence[npt.NDArray[np.int64]], one_document: bool
) -> Iterator[PackedBatch]:
    """The forwards of these packs.

    Args:
        one_document: each sample is a forward of its own (for models that mix packed documents); a step is still
            made of the same samples.
    """
    for pack in packs:
        for samples in [[index] for index in pack] if one_document else [pack]:
            yield build_batch(store, samples)
