"""Steps of a run: batches, their rows, and the place after each step. The loop's only access to data."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tunesmith.data.pack import EMPTY_BATCH, Batch, build_batch, build_tree_batch
from tunesmith.data.store import TokenStore
from tunesmith.display import format_count
from tunesmith.plans.mix import Mix
from tunesmith.plans.plan import Plan, ShuffledPlan
from tunesmith.plans.prefixes import Prefixes

Pack = npt.NDArray[np.int64]
Place = Any  # JSON value: where the next step begins; opaque outside the feed
FIRST_PLACE: Place = (0, 0)


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Counts of some packs by the sources of a mix; empty without one."""

    tokens: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Packs of a store as batches, each built on demand.

    Attributes:
        packs: sample numbers of each pack.
        is_packed: one batch per pack; otherwise one batch per sample (for models that mix packed documents).
        rank, size: this is the share of one of `size` processes: every size-th pack of a step, from `rank` on.
        num_empty: batches of nothing at the end, where other processes have more forwards to make.
        mix: of training data with several sources; their losses are computed separately.
        prefixes: of the samples, where each pack is computed as prefix trees.
        trains_once: in prefix trees, the samples of a row train a token that they share once.
    """

    store: TokenStore
    packs: Sequence[Pack]
    is_packed: bool = True
    rank: int = 0
    size: int = 1
    num_empty: int = 0
    mix: Mix | None = None
    prefixes: Prefixes | None = None
    trains_once: bool = False

    def __iter__(self) -> Iterator[Batch]:
        for place, pack in enumerate(self.packs):
            number = self.rank + place * self.size  # of the pack in its step
            groups: Sequence[Sequence[int] | Pack] = [pack] if self.is_packed else [[int(index)] for index in pack]
            for at, samples in enumerate(groups):
                yield self._build(samples, (number, at))
        for _ in range(self.num_empty):
            yield EMPTY_BATCH

    def _build(self, samples: Sequence[int] | Pack, number: tuple[int, int] = (0, 0)) -> Batch:
        if self.prefixes is None:
            return build_batch(self.store, samples, number, self.mix)
        row_ids = self.prefixes.row_ids if self.trains_once else None
        return build_tree_batch(self.store, samples, number, self.mix, row_ids)

    def __len__(self) -> int:
        return len(self.packs) if self.is_packed else self.num_samples

    @property
    def num_samples(self) -> int:
        return sum(len(pack) for pack in self.packs)

    @property
    def num_tokens(self) -> int:
        """Computed ones: in prefix trees, a shared token counts once."""
        return sum(int(self._fresh(pack).sum()) for pack in self.packs)

    def _fresh(self, pack: Pack) -> Pack:
        """Tokens computed for each sample of a pack."""
        return self.store.lengths_of(pack) if self.prefixes is None else self.prefixes.fresh(pack)

    @property
    def num_targets(self) -> int:
        if self.trains_once:
            return sum(self._build(pack).num_targets for pack in self.packs)
        return sum(int(self.store.num_targets[pack].sum()) for pack in self.packs)

    @property
    def num_sources(self) -> int:
        """Sources whose losses are computed; 0 where the data is no mix."""
        return self.mix.size if self.mix is not None else 0

    def count_sources(self) -> SourceCounts:
        """Tokens, shared or not, and targets of each source of a mix."""
        if self.mix is None:
            return SourceCounts()
        samples = np.concatenate([np.zeros(0, np.int64), *self.packs])
        sources, size = self.mix.source_of[samples], self.mix.size
        counts = [
            np.bincount(sources, weights, size).astype(np.int64).tolist()
            for weights in (self.store.lengths_of(samples), self.store.num_targets[samples])
        ]
        if self.trains_once:
            found = np.concatenate([np.zeros(0, np.int64), *(self._build(pack).sources for pack in self.packs)])
            counts[1] = np.bincount(found, minlength=size).tolist()
        return SourceCounts(*map(tuple, counts))

    @property
    def num_squares(self) -> int:
        """Sum over the documents of computed tokens x length: what attention costs."""
        return sum(int((self._fresh(pack).astype(np.int64) * self.store.lengths_of(pack)).sum()) for pack in self.packs)

    def num_tokens_of(self, forward: int) -> int:
        """Args:
        forward: number of a batch, from 0.
        """
        return int(self._fresh(np.array(self._samples_of(forward), np.int64)).sum())

    def rows_of(self, forward: int) -> list[str]:
        """FILE:ROW of every sample of one batch."""
        return [self.store.where(index) for index in self._samples_of(forward)]

    def _samples_of(self, forward: int) -> list[int]:
        if self.is_packed:
            return [int(index) for pack in self.packs[forward : forward + 1] for index in pack]
        return [int(index) for pack in self.packs for index in pack][forward : forward + 1]

    def rows(self) -> list[str]:
        """FILE:ROW of every sample, in batch order."""
        return [self.store.where(int(index)) for pack in self.packs for index in pack]

    def share(self, rank: int, size: int) -> Batches:
        """Every size-th pack starting at `rank`: the share of one of `size` processes.

        Empty batches make all shares equally long: processes that shard a model must make the same forwards.
        """
        own = replace(self, packs=self.packs[rank::size], rank=rank, size=size)
        longest = max(len(replace(self, packs=self.packs[other::size])) for other in range(size))
        return replace(own, num_empty=longest - len(own))


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The data of one optimizer update.

    Attributes:
        batches: those of this process.
        whole: those of all processes.
        epoch: epochs completed after this step.
        place: where the next step begins.
    """

    batches: Batches
    whole: Batches
    epoch: float
    place: Place

    def rows(self) -> list[str]:
        return self.whole.rows()


class StepFeed(Protocol):
    """The data of a run as the loop and the summary know it: `Feed`, or one that prepares its rows on the way."""

    @property
    def packs_per_step(self) -> int: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def held_out(self) -> Batches | None: ...
    @property
    def mix(self) -> Mix | None: ...
    @property
    def total_epochs(self) -> float | None:
        """Of the run; None if that is not known before it ends."""

    @property
    def tokens_per_step(self) -> float:
        """About."""

    def steps(self, place: Place = FIRST_PLACE, rank: int = 0, size: int = 1) -> Generator[Step | None, None, None]:
        """Endless steps starting at a place, each with the packs of one of `size` processes.

        None: the rows of the next step are not ready; ask again.
        """

    def describe_packs(self, noun: str) -> str:
        """How many packs there are of what size, for the summary.

        Args:
            noun: what a pack is called.
        """

    def describe_steps(self) -> str:
        """How many steps there are of what size, for the summary."""


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """Distribute the packs of every epoch to steps.

    Attributes:
        store: the training data.
        plan: the packs of every epoch.
        packs_per_step: train.grad_accum_steps.
        total_steps: optimizer steps of the run.
        held_out: evaluation data, if any.
        mix: the sources of the training data, if it is a mix.
        prefixes, trains_once: see `Batches`.
    """

    store: TokenStore
    plan: Plan
    packs_per_step: int
    total_steps: int
    held_out: Batches | None = None
    is_packed: bool = True
    mix: Mix | None = None
    prefixes: Prefixes | None = None
    trains_once: bool = False

    def steps(self, place: Place = FIRST_PLACE, rank: int = 0, size: int = 1) -> Generator[Step, None, None]:
        """Endless steps starting at a place, each with the packs of one of `size` processes."""
        epoch, first = place
        while True:
            packs = self.plan.packs(epoch)
            for start in range(first, len(packs), self.packs_per_step):
                group = packs[start : start + self.packs_per_step]
                behind = start + len(group)
                after = (epoch, behind) if behind < len(packs) else (epoch + 1, 0)
                whole = Batches(
                    self.store, group, self.is_packed, mix=self.mix, prefixes=self.prefixes,
                    trains_once=self.trains_once,
                )  # fmt: skip
                yield Step(whole.share(rank, size), whole, epoch + behind / len(packs), after)
            epoch, first = epoch + 1, 0

    @property
    def capacity(self) -> int:
        """Tokens per pack."""
        return self.plan.capacity

    @property
    def packs_per_epoch(self) -> int:
        return self.plan.count(0)

    @property
    def tokens_per_epoch(self) -> int:
        return self.plan.tokens_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.packs_per_epoch // self.packs_per_step)

    @property
    def total_epochs(self) -> float:
        """Of the run; epochs may differ by a pack or two."""
        return self.total_steps / self.steps_per_epoch

    @property
    def tokens_per_step(self) -> float:
        return self.tokens_per_epoch / self.steps_per_epoch

    def describe_packs(self, noun: str) -> str:
        num_packs = self.packs_per_epoch
        fill = self.tokens_per_epoch / (num_packs * self.capacity)
        return f"{num_packs:,} {noun}s an epoch of {self.capacity} tokens, {fill:.1%} full"

    def describe_steps(self) -> str:
        size = format_count(self.tokens_per_step)
        return f"{self.total_steps:,} steps of about {size} tokens, {self.total_epochs:.2f} epochs"


def plan_samples(
    store: TokenStore, samples: Pack, capacity: int, seed: int, epoch: int, prefixes: Prefixes | None = None
) -> Sequence[Pack]:
    """The packs of an epoch, as sample numbers of the store."""
    return ShuffledPlan(samples, store.lengths, capacity, seed, prefixes).packs(epoch)
