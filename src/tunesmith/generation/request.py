"""What is asked of the generator: a prompt with its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tunesmith.generation.sampling import Sampling


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
