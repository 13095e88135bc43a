"""Replies of an opened model: streamed, or many together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.generation.decode import decode_reply
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker


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
