"""Ask a model the held-out chats turn by turn, its own replies in the history, and score each turn by exact match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config.schema import ModelSection
from tunesmith.demo.chats import Chat
from tunesmith.generation.replies import Reply, reply_to
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import load_speaker
from tunesmith.rows.conversation import Message

_REPLY_TOKENS = 48


@dataclass(frozen=True, slots=True)
class KindScore:
    """Exact match on the held-out questions of a kind.

    Attributes:
        right: of each turn, the share of right replies.
        best_constant: the share that the best fixed answer to all of them would get.
    """

    kind: str
    right: tuple[float, ...]
    best_constant: float


def ask(model: Path, chats: Sequence[Chat]) -> list[list[Reply]]:
    """Greedy replies to the questions of each chat; all chats have the same number of turns."""
    speaker = load_speaker(ModelSection(path=str(model)))
    said: list[list[Message]] = [[] for _ in chats]
    replies: list[list[Reply]] = [[] for _ in chats]
    for turn in range(len(chats[0])):
        for history, chat in zip(said, chats, strict=True):
            history.append(Message("user", chat[turn].question))
        prompts = [speaker.encoder.encode_prompt(history) for history in said]
        for place, reply in enumerate(reply_to(speaker, prompts, Sampling(_REPLY_TOKENS, temperature=0))):
            said[place].append(Message("assistant", reply.text))
            replies[place].append(reply)
    return replies


def score_kinds(chats: Sequence[Chat], replies: Sequence[Sequence[Reply]], kinds: Sequence[str]) -> list[KindScore]:
    scores = []
    for kind in kinds:
        right = tuple(share_right(chats, replies, turn, kind) for turn in range(len(chats[0])))
        answers = Counter(task.answer for chat in chats for task in chat if task.kind == kind)
        scores.append(KindScore(kind, right, answers.most_common(1)[0][1] / answers.total()))
    return scores


def share_right(
    chats: Sequence[Chat], replies: Sequence[Sequence[Reply]], turn: int | None = None, kind: str | None = None
) -> float:
    """The share of replies that are exactly the answer, of all or of one turn and kind."""
    marks = [
        reply.text == task.answer
        for chat, answered in zip(chats, replies, strict=True)
        for place, (task, reply) in enumerate(zip(chat, answered, strict=True))
        if turn in (None, place) and kind in (None, task.kind)
    ]
    return sum(marks) / len(marks)


def share_stopped(replies: Sequence[Sequence[Reply]]) -> float:
    """The share of replies that ended by themselves."""
    return sum(reply.has_stopped for chat in replies for reply in chat) / sum(map(len, replies))
