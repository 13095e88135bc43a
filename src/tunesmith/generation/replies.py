"""Replies of an opened model: streamed, or many together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tunesmith.errors import ModelError
from tunesmith.generation.batcher import Batcher, Token
from tunesmith.generation.decode import decode_reply
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker

_WAITING = 64  # rows handed to the batcher before they run
_ROW_ERRORS = ("context-full", "prompt-empty", "token-out-of-range")  # of one prompt, not of the model
Tag = TypeVar("Tag")


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of a reply without its stop token, and whether it ended with a stop token or a stop string."""

    text: str
    has_stopped: bool


def stream_reply(speaker: Speaker, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of the reply to a prompt (as ids) as they are generated; joined, they equal the text of `reply_to`.

    Raises:
        ModelError: no reply fits the context.
    """
    for token in speaker.generate([prompt], sampling):
        yield token.text


def reply_to(speaker: Speaker, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
    """The replies to prompts (as ids), computed together.

    Raises:
        ModelError: no reply fits the context.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]
    has_stopped = [False] * len(prompts)
    for token in speaker.generate(prompts, sampling):
        ids[token.row].append(token.id)
        pieces[token.row].append(token.text)
        has_stopped[token.row] = token.finish_reason == "stop"
    if sampling.stop:
        texts = ["".join(some) for some in pieces]
    else:
        texts = [decode_reply(speaker.encoder, [i for i in some if i not in speaker.stop_ids]) for some in ids]
    return [Reply(text, stopped) for text, stopped in zip(texts, has_stopped, strict=True)]


@dataclass(frozen=True, slots=True)
class Finished:
    """A reply that has ended.

    Attributes:
        ids: its tokens without stop tokens.
        finish_reason: "stop" (a stop token or stop string), "length" or "error".
        logprob: mean log-probability of its tokens, the stop token included; None where the request asks for none.
        error: code of the error that ended it ("context-full").
    """

    ids: Sequence[int]
    text: str
    finish_reason: str
    logprob: float | None = None
    error: str = ""


@dataclass(slots=True)
class _Growing:
    """A reply while its tokens come."""

    has_stops: bool
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprob: float = 0.0
    num_logprobs: int = 0

    def add(self, token: Token) -> None:
        self.pieces.append(token.text)
        if token.error is None:
            self.ids.append(token.id)
        if token.logprob is not None:
            self.logprob += token.logprob
            self.num_logprobs += 1

    def finish(self, speaker: Speaker, token: Token) -> Finished:
        said = [token_id for token_id in self.ids if token_id not in speaker.stop_ids]
        text = "".join(self.pieces) if self.has_stops else decode_reply(speaker.encoder, said)
        mean = self.logprob / self.num_logprobs if self.num_logprobs else None
        return Finished(said, text, token.finish_reason or "", mean, token.error.code if token.error else "")


def answer_all(
    speaker: Speaker, batcher: Batcher, asked: Iterable[tuple[Tag, Request]]
) -> Iterator[tuple[Tag, Finished]]:
    """The replies to any number of requests, as they end; each is what its request alone would get.

    Requests are taken as there is room for them, so that they need not be in memory together.

    Raises:
        ModelError: the model cannot be used. Errors of one prompt are results.
    """
    waiting = iter(asked)
    running: dict[int, tuple[Tag, _Growing]] = {}
    has_more = True
    try:
        while has_more or running:
            while has_more and batcher.num_waiting < _WAITING:
                one = next(waiting, None)
                if one is None:
                    has_more = False
                    break
                tag, request = one
                try:
                    row = batcher.submit(request)
                except ModelError as error:
                    if error.code not in _ROW_ERRORS:
                        raise
                    yield tag, Finished([], "", "error", None, error.code)
                else:
                    running[row] = (tag, _Growing(bool(request.stop_strings or request.sampling.stop)))
            for token in batcher.step():
                tag, growing = running[token.row]
                growing.add(token)
                if token.is_last:
                    del running[token.row]
                    yield tag, growing.finish(speaker, token)
    finally:
        for row in running:
            batcher.cancel(row)
