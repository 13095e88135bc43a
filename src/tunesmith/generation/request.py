"""What is asked of the generator, a prompt with its settings, and the row that answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from tunesmith.generation.cache import RowCache, Shelf
from tunesmith.generation.decode import ReplyText
from tunesmith.generation.sampling import Sampling

if TYPE_CHECKING:
    from tunesmith.generation.choose import Chooser


class Constraint(Protocol):
    """Limits the tokens of one row, for example to those that a JSON schema allows. An object belongs to one row."""

    def mask(self) -> Tensor:
        """The tokens allowed at the next position: [vocab] bool; ids beyond its end are not allowed."""

    def accept(self, token_id: int) -> None:
        """Go on behind a token that was chosen."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue.

    Attributes:
        ids: token ids of the prompt, at least one.
        stop_strings: texts that end the reply and are left out of it, besides those of `sampling`.
        top_logprobs: None: no log-probabilities; 0: of the chosen token; n: and of the n likeliest. They are those of
            the model's distribution, before temperature, other settings and constraints.
        adapter: one of Speaker.adapter_names, or "base"; None: the active one.
    """

    ids: Sequence[int]
    sampling: Sampling
    stop_strings: Sequence[str] = ()
    top_logprobs: int | None = None
    adapter: str | None = None
    constraint: Constraint | None = None


@dataclass(slots=True, eq=False)
class Row:
    """A prompt and its reply so far.

    Attributes:
        adapter: its resolved name; "base" where there is none.
        ids: tokens of the prompt and the reply.
        left: new tokens that it may still have.
        computed: how many of `ids` are in the cache.
        cache: keys and values while the prompt is read.
        shelf: where they are afterwards.
        own: the model's own cache, where rows cannot be batched.
    """

    number: int
    request: Request
    adapter: str
    ids: list[int]
    left: int
    chooser: Chooser
    text: ReplyText
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
