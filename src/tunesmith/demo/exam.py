"""Ask a model the held-out chats turn by turn, its own replies in the history, and score each turn by exact match.

Replies, scores and intervals are those of `tunesmith evaluate` (its strict exact match), which gives the same figures
for the first turns. Of later turns it asks with the right answers in the history, where people have the model's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.config.schema import ModelSection
from tunesmith.demo.chats import Chat
from tunesmith.evaluation.intervals import Counted, ratio, score_models
from tunesmith.evaluation.records import Score
from tunesmith.evaluation.replies import Asked, generate
from tunesmith.generation.replies import Reply
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
    sampling = Sampling(_REPLY_TOKENS, temperature=0)
    for turn in range(len(chats[0])):
        asked = []
        for place, (history, chat) in enumerate(zip(said, chats, strict=True)):
            history.append(Message("user", chat[turn].question))
            ids = speaker.encoder.encode_prompt(history)
            asked.append(Asked(place, f"chat {place + 1}", turn, ids, chat[turn].answer, 0, (), False, seed=0))
        for one, record in generate(speaker, asked, sampling, model.name):
            said[one.row].append(Message("assistant", record.reply))
            replies[one.row].append(Reply(record.reply, record.has_stopped))
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
    value = score_right(chats, replies, turn, kind).value
    assert value is not None
    return value


def score_right(
    chats: Sequence[Chat], replies: Sequence[Sequence[Reply]], turn: int | None = None, kind: str | None = None
) -> Score:
    """`share_right` with its interval."""
    counts = np.zeros((len(chats), 2))
    for row, (chat, answered) in enumerate(zip(chats, replies, strict=True)):
        for place, (task, reply) in enumerate(zip(chat, answered, strict=True)):
            if turn in (None, place) and kind in (None, task.kind):
                counts[row] += (reply.text == task.answer, 1)
    (scores,), _ = score_models([{"right": Counted(counts, ratio, is_share=True)}], [], seed=0)
    return scores["right"]


def share_stopped(replies: Sequence[Sequence[Reply]]) -> float:
    """The share of replies that ended by themselves."""
    return sum(reply.has_stopped for chat in replies for reply in chat) / sum(map(len, replies))
