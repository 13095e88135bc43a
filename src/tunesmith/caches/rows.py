"""A row as its cache sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.caches.store import RowCache, Shelf


@dataclass(slots=True, eq=False)
class CachedRow:
    """The tokens of a prompt and its reply so far, and where their keys and values are.

    Attributes:
        adapter: name of the adapter that it runs with.
        ids: tokens of the prompt and the reply.
        left: new tokens that may still come.
        computed: how many of `ids` are in the cache.
        cache: keys and values while the prompt is read.
        shelf: where they are afterwards.
        own: the model's own cache, where rows cannot be batched.
    """

    number: int
    adapter: str
    ids: list[int]
    left: int
    computed: int = 0
    cache: RowCache | None = None
    shelf: Shelf | None = None
    own: Any = None

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache."""
        return len(self.ids) - self.computed

    @property
    def final_length(self) -> int:
        """Length of the prompt with the longest reply."""
        return len(self.ids) + self.left
