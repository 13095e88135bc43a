"""Operations that involve all processes of a run: sums, joint decisions, files that only one process writes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class World(Protocol):
    """The processes that train one model together.

    Every process calls `sum`, `agree` and `barrier` in the same order.

    Attributes:
        rank: rank of this process, from 0.
        size: number of processes.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes shared files."""

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all processes, on the tensor's device; counts on the CPU do not wait for a GPU."""

    def agree(self, wish: bool) -> bool:
        """Whether any process passed True; all processes get the same answer."""

    def barrier(self) -> None:
        """Wait until every process has reached this call."""


class OneProcess:
    """A run in one process."""

    rank = 0
    size = 1
    is_main = True

    def sum(self, values: Tensor) -> Tensor:
        return values

    def agree(self, wish: bool) -> bool:
        return wish

    def barrier(self) -> None:
        pass
