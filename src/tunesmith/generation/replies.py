"""Replies of an opened model: streamed, or many together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.generation.decode import PieceDecoder, decode_reply
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of a reply without its stop token, and whether it ended with a stop token."""

    text: str
    has_stopped: bool


def stream_reply(speaker: Speaker, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of the reply to a prompt (as ids) as they are generated; joined, they equal the text of `reply_to`.

    Raises:
        ModelError: no reply fits the context.
    """
    pieces = PieceDecoder(speaker.encoder)
    for token in speaker.generate([prompt], sampling):
        if token.id not in speaker.stop_ids:
            yield pieces.push(token.id)
    yield pieces.finish()


def reply_to(
    speaker: Speaker, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int = 32
) -> list[Reply]:
    """The replies to prompts (as ids), computed in batches.

    Raises:
        ModelError: no reply fits the context.
    """
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths need little padding
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for token in speaker.generate([prompts[i] for i in chosen], sampling):
            found[chosen[token.row]].append(token.id)
    return [
        Reply(
            decode_reply(speaker.encoder, [i for i in ids if i not in speaker.stop_ids]),
            bool(ids) and ids[-1] in speaker.stop_ids,
        )
        for ids in found
    ]
