"""What concerns all processes of a run: sums over them, decisions that they take together, files that one writes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class World(Protocol):
    """The processes that train one model together.

    Every process calls `sum`, `agree` and `barrier` in the same order.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes the files of which there is one."""

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over all processes, on the tensor's own device; counts on the CPU wait for no GPU."""

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it; the same answer in all of them."""

    def barrier(self) -> None:
        """Wait until every process is here."""


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
