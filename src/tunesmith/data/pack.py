"""Batches: the samples of a pack as the input of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.store import TokenStore
from tunesmith.plans.mix import Mix
from tunesmith.plans.tree import Tree, build_tree, count_before


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
        targets: int64 [targets], the tokens to predict. Never the first token of a document, which has no context. In
            prefix trees a token that several samples train is there once for each.
        target_at: int64 [targets], the positions whose outputs predict them, ascending; in prefix trees several targets
            may have the same one.
        layout: which tokens attend to which.
        number: of the pack in its step and of the batch in the pack, counted over all processes.
        is_empty: it is computed for the sake of other processes, and counts nothing.
        sources: int64 [targets], the source of each target, where the training data is a mix.
        num_sources: of the mix.
        inputs: the arguments of the forward, where they are on the device already (training/transfer.py).
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    target_at: npt.NDArray[np.int64]
    layout: Documents | Tree
    number: tuple[int, int] = (0, 0)
    is_empty: bool = False
    sources: npt.NDArray[np.int64] | None = None
    num_sources: int = 0
    inputs: Any = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_targets(self) -> int:
        return len(self.targets)


_NOTHING = np.zeros(0, np.int64)
EMPTY_BATCH = Batch(np.zeros((1, 2), np.int64), np.arange(2)[None], _NOTHING, _NOTHING, Documents([2]), is_empty=True)


def build_batch(
    store: TokenStore,
    samples: Sequence[int] | npt.NDArray[np.int64],
    number: tuple[int, int] = (0, 0),
    mix: Mix | None = None,
) -> Batch:
    """Join samples, given by their numbers, into one batch."""
    documents = [store[int(index)] for index in samples]
    lens = [len(document.input_ids) for document in documents]
    input_ids = np.concatenate([document.input_ids for document in documents]).astype(np.int64)
    loss_mask = np.concatenate([document.loss_mask for document in documents]).astype(bool)
    loss_mask[np.cumsum([0, *lens[:-1]])] = False
    trained = np.flatnonzero(loss_mask)
    position_ids = np.concatenate([np.arange(length) for length in lens])
    batch = Batch(input_ids[None], position_ids[None], input_ids[trained], trained - 1, Documents(lens), number)
    if mix is None:
        return batch
    sources = np.repeat(mix.source_of[np.asarray(samples)].astype(np.int64), lens)[trained]
    return replace(batch, sources=sources, num_sources=mix.size)


def build_tree_batch(
    store: TokenStore,
    samples: Sequence[int] | npt.NDArray[np.int64],
    number: tuple[int, int] = (0, 0),
    mix: Mix | None = None,
    row_ids: npt.NDArray[np.int64] | None = None,
) -> Batch:
    """Join samples, given by their numbers, into one batch of prefix trees. Its loss is that of `build_batch`.

    Args:
        row_ids: of each sample of the store; the samples of a row then train a token that they share once. A sample
            that is in the pack several times, as a mix may take it, trains its tokens as often.
    """
    documents = [store[int(index)] for index in samples]
    joined = build_tree([document.input_ids for document in documents])
    own, before, owners = [], [], []  # positions of the targets, positions before them on their paths, samples
    for owner, (document, place) in enumerate(zip(documents, joined.places, strict=True)):
        trained = np.flatnonzero(np.asarray(document.loss_mask[1:], bool))
        own.append(place[1:][trained])
        before.append(place[:-1][trained])
        owners.append(np.full(len(trained), owner))
    targets, target_at, sample = np.concatenate(own), np.concatenate(before), np.concatenate(owners)
    if row_ids is not None:
        rows, times = row_ids[np.asarray(samples)][sample], count_before(np.asarray(samples))[sample]
        kept = np.unique(np.stack([rows, times, targets]), axis=1, return_index=True)[1]
        targets, target_at, sample = targets[kept], target_at[kept], sample[kept]
    order = np.lexsort((sample, targets, target_at))
    targets, target_at, sample = targets[order], target_at[order], sample[order]
    ids = joined.input_ids
    batch = Batch(ids[None], joined.position_ids[None], ids[targets], target_at, joined.layout, number)
    if mix is None:
        return batch
    sources = mix.source_of[np.asarray(samples)].astype(np.int64)[sample]
    return replace(batch, sources=sources, num_sources=mix.size)
