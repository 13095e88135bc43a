"""The packs of one pass over samples, made window by window when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from tunesmith.plans.packers import Packer
from tunesmith.plans.packing import WINDOW

Numbers = npt.NDArray[np.int64]
Arrange = Callable[[int, list[Numbers]], list[Numbers]]  # number of a window, its packs -> these in another order


def shuffle(num_samples: int, seed: int, epoch: int) -> tuple[Numbers, np.random.Generator]:
    """The samples of an epoch in random order, and the generator that then shuffles their packs."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_samples), rng


def count_windows(packer: Packer, order: Numbers) -> Numbers:
    """Packs of each window of the samples in this order."""
    return np.array([packer.count(window) for window in windows_of(order)], dtype=np.int64)


def windows_of(order: Numbers) -> list[Numbers]:
    """Samples that are packed together."""
    return [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]


class PackedEpoch(Sequence[Numbers]):
    """The packs of an epoch, each an array of sample numbers. Nothing is packed before it is asked for.

    Args:
        order: numbers of the epoch's samples, in order; a window that is packed is sorted here by its packs, so
            that packing takes no more memory than this array.
        counts: packs of each window, from `count_windows`.
        pack_order: number of a pack in the order of the windows, for each place; None: windows one after another.
        arrange: puts the packs of a window in order; default: as the packer makes them.
    """

    def __init__(
        self,
        packer: Packer,
        order: Numbers,
        counts: Numbers,
        pack_order: Numbers | None = None,
        arrange: Arrange | None = None,
    ) -> None:
        self._packer, self._order, self._arrange = packer, order, arrange
        self._first = np.concatenate([[0], np.cumsum(counts)])  # pack of each window
        self._pack_order = pack_order
        self._ends: dict[int, npt.NDArray[np.int32]] = {}  # window -> where each of its packs ends

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: int) -> Numbers: ...
    @overload
    def __getitem__(self, index: slice) -> list[Numbers]: ...
    def __getitem__(self, index: int | slice) -> Numbers | list[Numbers]:
        if isinstance(index, slice):
            return [self._pack(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._pack(index % len(self))

    def __iter__(self) -> Iterator[Numbers]:
        return map(self._pack, range(len(self)))

    @property
    def num_packed(self) -> int:
        """Windows that are packed by now."""
        return len(self._ends)

    def _pack(self, place: int) -> Numbers:
        number = int(self._pack_order[place]) if self._pack_order is not None else place
        window = int(np.searchsorted(self._first, number, side="right")) - 1
        if window not in self._ends:
            self._pack_window(window)
        ends, at = self._ends[window], number - int(self._first[window])
        start = window * WINDOW
        return self._order[start + (int(ends[at - 1]) if at else 0) : start + int(ends[at])]

    def _pack_window(self, window: int) -> None:
        samples = self._order[window * WINDOW : (window + 1) * WINDOW]
        packs = self._packer.pack(samples)
        assert len(packs) == self._first[window + 1] - self._first[window]
        packs = self._arrange(window, packs) if self._arrange else packs
        self._ends[window] = np.cumsum([len(pack) for pack in packs], dtype=np.int32)
        if packs:
            samples[:] = np.concatenate(packs)
