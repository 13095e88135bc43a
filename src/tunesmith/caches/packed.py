"""Forwards over many rows at once, and the memory of their caches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tunesmith.caches.attention import CachedRows, ChunkPart, Part, ShelfPart, configs_of, swapped_attention
from tunesmith.caches.prefixes import WORTHWHILE, Kept, KeptPrefixes, common_length
from tunesmith.caches.rows import CachedRow
from tunesmith.caches.store import Layout, RowCache, Shelf, size_of_shelf

_SHARE_KEPT = 0.25  # of the memory, at most, for caches of finished rows


class PackedRows:
    """Rows of one model whose new tokens run through it in one forward.

    Args:
        memory_bytes: limit of all caches together, those of finished rows included.
        longest: limit of a row in tokens.
    """

    can_read_in_chunks = True

    def __init__(self, model: nn.Module, layout: Layout, memory_bytes: int, longest: int) -> None:
        self._model, self._layout = model, layout
        self._memory_bytes, self._longest = memory_bytes, longest
        self._configs = configs_of(model)
        self._takes_kept = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._device = next(model.parameters()).device
        self._shelves: dict[tuple[str, int], Shelf] = {}
        self._reading: list[CachedRow] = []
        self._kept = KeptPrefixes()

    @property
    def num_bytes(self) -> int:
        """Memory of all caches now."""
        shelves = sum(shelf.num_bytes for shelf in self._shelves.values())
        reading = sum(row.cache.num_bytes for row in self._reading if row.cache is not None)
        return shelves + reading + self._kept.num_bytes

    def admit(self, row: CachedRow) -> bool:
        """Make room to read a row's prompt, with the cached beginning that it shares with another row.

        Returns:
            False where it must wait.
        """
        capacity = min(len(row.ids) + 1, self._longest)
        place = size_of_shelf(self._expected(row), self._longest)
        if not self._make_room((capacity + place) * self._layout.bytes_a_token):
            return False
        row.cache = RowCache(self._layout, capacity)
        source, length = self._find_beginning(row)
        if length:
            row.cache.copy_from(source, length)
        row.computed = length
        self._reading.append(row)
        return True

    def _expected(self, row: CachedRow) -> int:
        """Tokens for which a row first gets room: its longest reply, if that is not much longer than its prompt."""
        return min(row.final_length, max(256, 2 * len(row.ids)), self._longest)

    def _find_beginning(self, row: CachedRow) -> tuple[Sequence[tuple[Tensor, Tensor]], int]:
        """Keys and values of the longest beginning that is cached, and its length; the last token is computed."""
        wanted = row.ids[:-1]
        source: Sequence[tuple[Tensor, Tensor]] = ()
        length = WORTHWHILE - 1
        if found := self._kept.find(row.adapter, wanted):
            kept, length = found
            source = list(zip(kept.cache.keys, kept.cache.values, strict=True))
        best = None
        for other in self._running():
            if other.adapter == row.adapter and other is not row:
                shared = min(common_length(other.ids, wanted), other.computed)
                if shared > length:
                    best, length = other, shared
        if best is not None:
            if best.shelf is not None:
                source = best.shelf.of(best)
            elif best.cache is not None:
                source = list(zip(best.cache.keys, best.cache.values, strict=True))
        return (source, length) if source else ((), 0)

    def _running(self) -> Iterator[CachedRow]:
        yield from self._reading
        for shelf in self._shelves.values():
            yield from shelf.rows

    def reads_beginning_of(self, row: CachedRow) -> bool:
        """Whether a row is just now reading a beginning that this one shares for its larger part."""
        return any(
            other.adapter == row.adapter
            and (shared := common_length(other.ids, row.ids)) >= max(WORTHWHILE, len(row.ids) // 2)
            and other.computed < shared
            for other in self._reading
        )

    def grow(self, row: CachedRow) -> bool:
        """Make room for a row's next token; False where there is no memory."""
        assert row.shelf is not None
        if row.computed < row.shelf.capacity:
            return True
        return self._move(row, size_of_shelf(row.computed + 1, self._longest))

    def _move(self, row: CachedRow, size: int) -> bool:
        """Move a row from its own cache, or from its shelf, to a shelf of a size."""
        key = (row.adapter, size)
        shelf = self._shelves.get(key)
        if shelf is None:
            shelf = Shelf(self._layout, size)
        if len(shelf.rows) == shelf.places:
            wanted = len(shelf.rows) + max(1, len(shelf.rows))
            while not self._make_room((wanted - shelf.places) * shelf.bytes_a_place):
                if wanted == shelf.places + 1:
                    return False
                wanted = shelf.places + 1
            shelf.resize(wanted)
        self._shelves[key] = shelf
        if row.cache is not None:
            shelf.add(row, list(zip(row.cache.keys, row.cache.values, strict=True)), row.computed)
            row.cache = None
            self._reading.remove(row)
        else:
            assert row.shelf is not None
            shelf.add(row, row.shelf.of(row), row.computed)
            row.shelf.remove(row)
        row.shelf = shelf
        return True

    def settle(self, row: CachedRow) -> bool:
        """Put a row that has read its prompt onto a shelf; False where there is no memory."""
        return self._move(row, size_of_shelf(self._expected(row), self._longest))

    def leave(self, row: CachedRow, is_kept: bool, is_damaged: bool = False) -> None:
        """Free a row's room; its cache is kept for later rows if there is memory for it."""
        if is_kept and not is_damaged and row.computed >= WORTHWHILE:
            self._keep(row)
        if row.cache is not None:
            self._reading.remove(row)
            row.cache = None
        if row.shelf is not None:
            row.shelf.remove(row, is_damaged)
            row.shelf = None
        row.computed = 0

    def _keep(self, row: CachedRow) -> None:
        size = row.computed * self._layout.bytes_a_token
        limit = int(self._memory_bytes * _SHARE_KEPT)
        if size > limit or (self.num_bytes + size > self._memory_bytes and not self._make_room(size)):
            return
        while self._kept.num_bytes + size > limit:
            self._kept.drop_oldest()
        if row.shelf is not None:
            source = row.shelf.of(row)
        else:
            assert row.cache is not None
            source = list(zip(row.cache.keys, row.cache.values, strict=True))
        cache = RowCache(self._layout, row.computed)
        cache.copy_from(source, row.computed)
        self._kept.keep(Kept(row.adapter, row.ids[: row.computed], cache))

    def _make_room(self, num_bytes: int) -> bool:
        """Whether so much more fits, once kept caches and unused places are dropped as far as needed."""
        if self.num_bytes + num_bytes <= self._memory_bytes:
            return True
        for key, shelf in list(self._shelves.items()):
            if not shelf.rows:
                del self._shelves[key]
        while len(self._kept) and self.num_bytes + num_bytes > self._memory_bytes:
            self._kept.drop_oldest()
        if self.num_bytes + num_bytes > self._memory_bytes:
            for shelf in self._shelves.values():
                if shelf.places > len(shelf.rows):
                    shelf.resize(len(shelf.rows))
        return self.num_bytes + num_bytes <= self._memory_bytes

    def adapters(self) -> set[str]:
        """Adapters of rows that are on shelves."""
        return {adapter for (adapter, _), shelf in self._shelves.items() if shelf.rows}

    def forward(self, adapter: str, chunks: Sequence[tuple[CachedRow, int]]) -> tuple[list[CachedRow], Tensor]:
        """One forward: the next token of every row on a shelf of an adapter, and chunks of prompts.

        Returns:
            The rows of which all tokens are computed now, and the logits of their next token, [rows, vocab] in float32.
        """
        parts: list[Part] = []
        ids: list[int] = []
        positions: list[int] = []
        rows: list[CachedRow] = []
        last: list[int] = []
        for (owner, _), shelf in self._shelves.items():
            if owner == adapter and shelf.rows:
                lengths = [row.computed for row in shelf.rows]
                last += range(len(ids), len(ids) + len(lengths))
                parts.append(ShelfPart(shelf, lengths))
                ids += [row.ids[-1] for row in shelf.rows]
                positions += lengths
                rows += shelf.rows
        for row, size in chunks:
            assert row.cache is not None
            parts.append(ChunkPart(row.cache, row.computed, size))
            ids += row.ids[row.computed : row.computed + size]
            positions += range(row.computed, row.computed + size)
            if size == row.pending:
                last.append(len(ids) - 1)
                rows.append(row)
        logits = self._run(ids, positions, last, CachedRows(self._layout, parts))
        for row in rows:
            row.computed = len(row.ids)
        for row, size in chunks:
            if row.computed < len(row.ids):
                row.computed += size
        return rows, logits

    def _run(
        self, ids: Sequence[int], positions: Sequence[int], last: Sequence[int], cached_rows: CachedRows
    ) -> Tensor:
        both = torch.tensor([ids, positions], device=self._device)
        wanted = torch.tensor(last, dtype=torch.long, device=self._device)
        kept = {"logits_to_keep": wanted if last else 1} if self._takes_kept else {}
        with swapped_attention(self._configs), torch.no_grad():
            output = self._model(
                input_ids=both[:1], position_ids=both[1:], use_cache=False, cached_rows=cached_rows, **kept
            )
        logits: Tensor = output.logits[0] if self._takes_kept else output.logits[0, wanted]
        return logits[: len(last)].float()
