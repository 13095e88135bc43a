"""Forwards for models whose caches cannot be batched: each row runs by itself, with the model's own cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunesmith.caches.rows import CachedRow


class RowsAlone:
    """Rows of one model, one forward each. A prompt is read in one forward, and no beginning is shared."""

    can_read_in_chunks = False

    def __init__(self, model: nn.Module, bytes_a_token: int, memory_bytes: int) -> None:
        self._model, self._bytes_a_token, self._memory_bytes = model, bytes_a_token, memory_bytes
        self._takes = inspect.signature(model.forward).parameters
        self._device = next(model.parameters()).device
        self._rows: list[CachedRow] = []

    @property
    def num_bytes(self) -> int:
        """Memory of all caches at their longest, as measured at start."""
        return sum(row.final_length for row in self._rows) * self._bytes_a_token

    def admit(self, row: CachedRow) -> bool:
        """Take a row; False where it must wait for memory."""
        if self._rows and self.num_bytes + row.final_length * self._bytes_a_token > self._memory_bytes:
            return False
        row.computed, row.own = 0, None
        self._rows.append(row)
        return True

    def reads_beginning_of(self, row: CachedRow) -> bool:
        return False

    def grow(self, row: CachedRow) -> bool:
        return True

    def settle(self, row: CachedRow) -> bool:
        return True

    def leave(self, row: CachedRow, is_kept: bool, is_damaged: bool = False) -> None:
        row.own, row.computed = None, 0
        self._rows.remove(row)

    def adapters(self) -> set[str]:
        """Adapters of rows that have read their prompt."""
        return {row.adapter for row in self._rows if row.computed}

    def forward(self, adapter: str, chunks: Sequence[tuple[CachedRow, int]]) -> tuple[list[CachedRow], Tensor]:
        """The next token of each row of an adapter, and of the new ones: (rows, logits [rows, vocab] in float32)."""
        new = [row for row, _ in chunks]
        rows = [row for row in self._rows if row.adapter == adapter and (row.computed or row in new)]
        return rows, torch.cat([self._run(row) for row in rows])

    @torch.no_grad()
    def _run(self, row: CachedRow) -> Tensor:
        ids = torch.tensor([row.ids[0 if row.own is None else row.computed :]], device=self._device)
        end = len(row.ids)
        given = {
            "position_ids": torch.arange(end - ids.shape[1], end, device=self._device)[None],
            "attention_mask": torch.ones(1, end, dtype=torch.long, device=self._device),
            "logits_to_keep": 1,
        }
        output = self._model(
            input_ids=ids,
            past_key_values=row.own,
            use_cache=True,
            **{name: value for name, value in given.items() if name in self._takes},
        )
        row.own = getattr(output, "past_key_values", None)
        row.computed = end
        logits: Tensor = output.logits[:, -1].float()
        return logits
