"""Continuous batching: rows join and leave while others run.

A step is one forward for each adapter in use: the next token of every running row, and chunks of the prompts that are
being read. So a long prompt delays the other rows by a chunk at a time.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.caches.alone import RowsAlone
from tunesmith.caches.memory import MemoryPlan, plan_memory
from tunesmith.caches.packed import PackedRows
from tunesmith.caches.rows import CachedRow
from tunesmith.errors import ModelError, UsageError
from tunesmith.generation.choose import Chooser, choose
from tunesmith.generation.decode import ReplyText
from tunesmith.generation.request import Request

if TYPE_CHECKING:
    from tunesmith.generation.speaker import Speaker


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        row: what `submit` returned.
        text: text that may be shown now; text that may begin a stop string is held back, stop tokens have none.
        logprob: of this token, and of the likeliest ones: in the model's distribution before any settings.
        finish_reason: "stop" (a stop token or stop string), "length" or "error"; None while the row goes on.
        error: with "error": what ended this row alone.
    """

    row: int
    id: int
    text: str
    logprob: float | None = None
    top_logprobs: Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None
    error: ModelError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class Row:
    """A reply that is being written."""

    cached: CachedRow
    request: Request
    chooser: Chooser
    text: ReplyText

    @property
    def number(self) -> int:
        return self.cached.number


class Batcher:
    """Generate for many rows at once. Not thread-safe: one thread calls its methods.

    Args:
        max_rows: rows that run at once; others wait.
        prefill_tokens: tokens of prompts read in one step.
        memory_bytes: limit of the caches; None: half of what is free now.
        num_sharing: batchers that share that half.

    Raises:
        ModelError: the memory does not hold a single row of the model's context.
    """

    def __init__(
        self,
        speaker: Speaker,
        *,
        max_rows: int = 64,
        prefill_tokens: int = 256,
        memory_bytes: int | None = None,
        num_sharing: int = 1,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise UsageError(f"{name}: must be a whole number of 1 or more, not {value}.", code="batcher-value")
        self._speaker = speaker
        self._max_rows, self._prefill_tokens = max_rows, prefill_tokens
        check = speaker.cache_check
        self.memory: MemoryPlan = plan_memory(
            speaker.model, speaker.context, check.bytes_a_token, max_rows, memory_bytes, num_sharing
        )
        self._engine: PackedRows | RowsAlone
        if check.layout is None:
            self._engine = RowsAlone(speaker.model, check.bytes_a_token, self.memory.memory_bytes)
        else:
            longest = self.memory.row_tokens
            self._engine = PackedRows(speaker.model, check.layout, self.memory.memory_bytes, longest)
        self._device = next(speaker.model.parameters()).device
        self._numbers = itertools.count()
        self._waiting: deque[Row] = deque()
        self._rows: dict[int, Row] = {}  # running, oldest first
        self._reading: list[CachedRow] = []

    @property
    def has_work(self) -> bool:
        """Whether a row is running or waiting."""
        return bool(self._rows or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Memory of all caches now, those kept of finished rows included."""
        return self._engine.num_bytes

    def submit(self, request: Request) -> int:
        """Queue a row; returns its number.

        Raises:
            ModelError: the prompt is empty, has unknown tokens or leaves no room for a reply; the adapter is unknown;
                the model's generation_config cannot be used.
        """
        speaker = self._speaker
        ids = list(request.ids)
        limit = speaker.room_for_reply(len(ids), request.sampling.max_new_tokens)
        limit = min(limit, self.memory.room_for_reply(len(ids)))
        self._require_prompt(ids)
        if limit < 1:
            raise UsageError("max_new_tokens: must be 1 or more to generate.", code="sampling-value")
        adapter = speaker.resolve_adapter(request.adapter)
        stops = (*request.stop_strings, *request.sampling.stop)
        chooser = Chooser(speaker.model, request, limit, speaker.stop_ids, self._device)
        text = ReplyText(speaker.encoder, stops)
        row = Row(CachedRow(next(self._numbers), adapter, ids, limit), request, chooser, text)
        self._waiting.append(row)
        return row.number

    def _require_prompt(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ModelError("the prompt is empty: there is no token to continue.", code="prompt-empty")
        vocab = self._speaker.num_embeddings
        if not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(one for one in ids if not 0 <= one < vocab)
            raise ModelError(
                f"the prompt has the token id {wrong}; the model knows ids from 0 to {vocab - 1:,}.",
                code="token-out-of-range",
            )

    def cancel(self, row: int) -> None:
        """Drop a row, running or waiting, and free its room. Unknown and finished rows are ignored."""
        running = self._rows.get(row)
        if running is not None:
            self._leave(running, is_kept=True)
        else:
            self._waiting = deque(one for one in self._waiting if one.number != row)

    @torch.no_grad()
    def step(self) -> list[Token]:
        """The next token of each running row that has read its prompt; reads a chunk of the others' prompts."""
        self._admit()
        for row in list(self._rows.values()):
            while row.number in self._rows and row.cached.shelf is not None and not self._engine.grow(row.cached):
                self._preempt()
        chunks = self._plan_chunks()
        found: list[Token] = []
        for adapter in sorted(self._engine.adapters() | {row.adapter for row, _ in chunks}):
            own = [(row, size) for row, size in chunks if row.adapter == adapter and row in self._reading]
            if not own and adapter not in self._engine.adapters():  # preempted within this step
                continue
            with self._speaker.using(adapter):
                done, logits = self._engine.forward(adapter, own)
            if done:
                found += self._take([self._rows[row.number] for row in done], logits)
        return found

    def _admit(self) -> None:
        """Let waiting rows in while there is room, and prompts to be read in this step."""
        unread = sum(row.pending for row in self._reading)
        skipped: list[Row] = []
        while self._waiting and len(self._rows) < self._max_rows and len(skipped) < self._max_rows:
            if unread >= self._prefill_tokens and len(self._reading) >= _MOST_READING:
                break
            row = self._waiting.popleft()
            if self._engine.reads_beginning_of(row.cached):
                skipped.append(row)  # a step or two later it can copy that beginning
                continue
            if not self._engine.admit(row.cached):
                self._waiting.appendleft(row)
                break
            self._rows[row.number] = row
            self._reading.append(row.cached)
            unread += row.cached.pending
        self._waiting.extendleft(reversed(skipped))

    def _plan_chunks(self) -> list[tuple[CachedRow, int]]:
        """How much of which prompt is read: half of the tokens for the oldest, the rest for the shortest ones first."""
        if not self._engine.can_read_in_chunks:
            return [(row, row.pending) for row in self._reading]
        left = self._prefill_tokens
        sizes: dict[int, int] = {}
        first = self._reading[:1]
        rest = sorted(self._reading[1:], key=lambda row: row.pending)
        for rows, share in ((first, (left + 1) // 2), (rest, left), (first, left)):
            for row in rows:
                size = min(row.pending - sizes.get(row.number, 0), share, left)
                if size > 0:
                    sizes[row.number] = sizes.get(row.number, 0) + size
                    left -= size
        return [(row, sizes[row.number]) for row in self._reading if row.number in sizes]

    def _preempt(self) -> None:
        """Memory is short: the youngest row waits again; its tokens so far are read anew later."""
        youngest = self._rows[next(reversed(self._rows))]
        self._leave(youngest, is_kept=False)
        self._waiting.appendleft(youngest)

    def _leave(self, row: Row, is_kept: bool, is_damaged: bool = False) -> None:
        if row.number not in self._rows:  # preempted within this step
            self._waiting.remove(row)
            return
        del self._rows[row.number]
        if row.cached in self._reading:
            self._reading.remove(row.cached)
        self._engine.leave(row.cached, is_kept, is_damaged)

    def _take(self, rows: Sequence[Row], logits: Tensor) -> list[Token]:
        """Choose each row's next token; rows that end leave."""
        logprobs = _Logprobs(rows, logits)
        chosen = choose(logits, [row.chooser for row in rows])
        values = logprobs.of(chosen)
        found = []
        for row, one in zip(rows, chosen, strict=True):
            if isinstance(one, ModelError):
                self._leave(row, is_kept=False, is_damaged=True)
                found.append(Token(row.number, -1, row.text.finish(), None, (), "error", one))
                continue
            logprob, top = values.get(row.number, (None, ()))
            found.append(self._continue(row, one, logprob, top))
        return found

    def _continue(self, row: Row, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> Token:
        row.cached.left -= 1
        is_stop = token in self._speaker.stop_ids
        text = "" if is_stop or token == self._speaker.encoder.eos_id else row.text.push(token)
        reason = "stop" if is_stop or row.text.is_stopped else None if row.cached.left else "length"
        if reason is None and (error := row.chooser.accept(token)) is not None:
            self._leave(row, is_kept=True)
            return Token(row.number, token, text + row.text.finish(), logprob, top, "error", error)
        if reason is None:
            row.cached.ids.append(token)
            if row.cached in self._reading:
                self._reading.remove(row.cached)
                while row.number in self._rows and not self._engine.settle(row.cached):
                    self._preempt()
            return Token(row.number, token, text, logprob, top)
        text += row.text.finish()
        if reason == "length" and row.text.is_stopped:
            reason = "stop"
        self._leave(row, is_kept=True)
        return Token(row.number, token, text, logprob, top, reason)


_MOST_READING = 8  # prompts that are read at the same time


class _Logprobs:
    """Log-probabilities of rows that ask for them, from the logits as the model gives them."""

    def __init__(self, rows: Sequence[Row], logits: Tensor) -> None:
        self._places = [place for place, row in enumerate(rows) if row.request.top_logprobs is not None]
        self._rows = [rows[place] for place in self._places]
        self._values = logits[self._places].log_softmax(-1) if self._places else logits[:0]

    def of(self, chosen: Sequence[int | ModelError]) -> dict[int, tuple[float, Sequence[tuple[int, float]]]]:
        """Row number -> (log-probability of its chosen token, the likeliest tokens with theirs)."""
        if not self._rows:
            return {}
        tokens = [token if isinstance(token := chosen[place], int) else 0 for place in self._places]
        own = self._values.gather(-1, torch.tensor(tokens, device=self._values.device)[:, None])[:, 0].tolist()
        most = min(max(row.request.top_logprobs or 0 for row in self._rows), self._values.shape[-1])
        best = self._values.topk(most, -1) if most else None
        tops = list(_pairs(best.indices, best.values)) if best is not None else [[] for _ in self._rows]
        return {
            row.number: (value, top[: row.request.top_logprobs])
            for row, value, top in zip(self._rows, own, tops, strict=True)
        }


def _pairs(ids: Tensor, values: Tensor) -> Iterator[list[tuple[int, float]]]:
    for some_ids, some_values in zip(ids.tolist(), values.tolist(), strict=True):
        yield list(zip(some_ids, some_values, strict=True))
