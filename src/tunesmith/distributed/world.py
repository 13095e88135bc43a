"""Operations that involve all processes of a run: sums, joint decisions, work that only one process does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor


class World(Protocol):
    """The processes that train one model together.

    Every process calls `sum`, `agree` and `share` in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its host.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def is_main(self) -> bool:
        """Whether this process prepares data, prints, logs and writes files."""

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all processes, on the tensor's device; counts on the CPU do not wait for a GPU."""

    def agree(self, wish: bool) -> bool:
        """Whether any process passed True; all processes get the same answer."""

    def share(self, make: Callable[[], Any]) -> Any:
        """The JSON value that `make` returns on the main process. The others wait for it, however long it takes.

        Raises:
            RunError: on the others, what `make` raised on the main process.
        """

    def explained(self) -> Any:
        """Context in which the loss of another process is raised as its own error.

        Raises:
            RunError: what ended the other process.
        """


class OneProcess:
    """A run in one process."""

    rank = 0
    size = 1
    local_rank = 0
    is_main = True

    def sum(self, values: Tensor) -> Tensor:
        return values

    def agree(self, wish: bool) -> bool:
        return wish

    def share(self, make: Callable[[], Any]) -> Any:
        return make()

    @contextmanager
    def explained(self) -> Iterator[None]:
        yield
