"""How much memory the caches of a generator may take, and how many rows that holds."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from tunesmith.errors import ModelError

_SHARE = 0.5  # of the free memory, by default
_MOVING = 2  # a row that has read its prompt is in two places for a moment
_FEWEST = 64  # tokens of a row; less is of no use
_UNLIMITED = 1 << 40


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Limits of the caches.

    Attributes:
        row_tokens: limit of one row, by the model's context and by the memory.
        context: the model's context; None if unknown.
    """

    memory_bytes: int
    bytes_a_token: int
    row_tokens: int
    context: int | None
    max_rows: int

    @property
    def rows_at_once(self) -> int:
        """How many rows of the longest length fit at once."""
        fitting = self.memory_bytes // max(1, self.row_tokens * self.bytes_a_token)
        return max(1, min(self.max_rows, fitting))

    def __str__(self) -> str:
        needed = self.max_rows * self.row_tokens * self.bytes_a_token
        return (
            f"{self.max_rows} rows x {self.row_tokens:,} tokens x {self.bytes_a_token:,} bytes a token = "
            f"{_size(needed)}; {_size(self.memory_bytes)} may be used, which holds {self.rows_at_once} rows of that "
            "length at once (more if they are shorter; others wait)"
        )

    def room_for_reply(self, prompt_tokens: int) -> int:
        """New tokens that fit behind a prompt.

        Raises:
            ModelError: none fits.
        """
        if prompt_tokens >= self.row_tokens:
            raise ModelError(
                f"the conversation has {prompt_tokens:,} tokens and there is memory for {self.row_tokens:,} "
                f"({_size(self.memory_bytes)} at {self.bytes_a_token:,} bytes a token), so no reply fits. Start a new "
                "conversation, write less, or give more memory.",
                code="context-full",
            )
        return self.row_tokens - prompt_tokens


def plan_memory(
    model: torch.nn.Module,
    context: int | None,
    bytes_a_token: int,
    max_rows: int,
    memory_bytes: int | None,
    num_sharing: int = 1,
) -> MemoryPlan:
    """Limits of the caches for a model.

    Raises:
        ModelError: the memory that was given does not hold one row of the model's context, or, where none was given,
            not even a short one.
    """
    limit = memory_bytes if memory_bytes is not None else int(_free_bytes(model) * _SHARE / num_sharing)
    fitting = limit // (_MOVING * bytes_a_token) if bytes_a_token else _UNLIMITED
    needed = min(context or _FEWEST, context or _FEWEST if memory_bytes is not None else _FEWEST)
    if fitting < needed:
        raise ModelError(
            f"the memory for caches is too small: a row of {needed:,} tokens takes {needed:,} x {bytes_a_token:,} "
            f"bytes, and twice that while it is moved: {_size(_MOVING * needed * bytes_a_token)}; "
            f"{_size(limit)} may be used. Raise the memory, or lower the context (max_position_embeddings) or use a "
            "smaller model.",
            code="cache-memory",
        )
    return MemoryPlan(limit, bytes_a_token, min(fitting, context or _UNLIMITED), context, max_rows)


def _free_bytes(model: torch.nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks that torch keeps for itself count as used
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"
