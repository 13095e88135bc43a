"""Replies one after another, behind the interface of the batcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tunesmith.errors import ModelError
from tunesmith.generation.batcher import Token as Drawn
from tunesmith.generation.decode import PieceDecoder
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker


class Constraint(Protocol):
    """Which tokens a row may continue with."""

    def mask(self) -> Sequence[bool]: ...

    def accept(self, token_id: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue."""

    ids: Sequence[int]
    sampling: Sampling
    stop_strings: Sequence[str] = ()
    top_logprobs: int | None = None
    adapter: str | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a row, with the text that may be shown now."""

    row: int
    id: int
    text: str
    logprob: float | None = None
    top_logprobs: Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None
    error: ModelError | None = None


class Batcher:
    """Generates the rows in the order of their submission."""

    def __init__(self, speaker: Speaker, *, max_rows: int = 64) -> None:
        self._speaker = speaker
        self._rows: dict[int, tuple[Iterator[Drawn], PieceDecoder, Request]] = {}
        self._next = 0

    @property
    def has_work(self) -> bool:
        return bool(self._rows)

    def submit(self, request: Request) -> int:
        self._speaker.room_for_reply(len(request.ids), request.sampling.max_new_tokens)
        row, self._next = self._next, self._next + 1
        drawn = self._speaker.generate([request.ids], request.sampling)
        self._rows[row] = (drawn, PieceDecoder(self._speaker.encoder), request)
        return row

    def cancel(self, row: int) -> None:
        self._rows.pop(row, None)

    def step(self) -> list[Token]:
        row, (drawn, decoder, request) = next(iter(self._rows.items()))
        if self._speaker.adapter_names and request.adapter:
            self._speaker.switch(request.adapter)
        try:
            token = next(drawn)
        except ModelError as error:
            self.cancel(row)
            return [Token(row, 0, "", finish_reason="error", error=error)]
        has_stopped = token.id in self._speaker.stop_ids
        text = "" if has_stopped else decoder.push(token.id)
        if token.is_last:
            self.cancel(row)
            text += decoder.finish() if not has_stopped else ""
        return [
            Token(row, token.id, text, finish_reason=("stop" if has_stopped else "length") if token.is_last else None)
        ]
