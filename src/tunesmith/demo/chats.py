"""Put tasks and small talk together into chats of several turns, some of them held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from tunesmith.demo.talk import TALK, draw_held_out_talk
from tunesmith.demo.tasks import TASKS, HeldOut, Task, Words, draw_held_out_tasks, normalize_question
from tunesmith.demo.wording import vary

KINDS: dict[str, Callable[[random.Random, Words], Task]] = {**TASKS, **TALK}
NUM_TURNS = 3  # of a held-out chat
_LENGTHS = {1: 4, 2: 2, 3: 3, 4: 2, 5: 1, 6: 1, 7: 0.5, 8: 1}  # turns of a trained chat -> how often
_SAME_KIND = 0.2  # how often a question is of the kind of the one before it: people try a thing twice
_EXAM_SEED = 31

Chat = tuple[Task, ...]  # question and answer, question and answer


def draw_held_out(num_each: int, kinds: Sequence[str]) -> tuple[list[Chat], HeldOut]:
    """Chats of held-out questions, and all that must be kept out of training for them.

    Each of the `num_each` (at most 40) questions of a kind is asked three times: as the first, second and third turn
    of a chat, so that the scores of the turns differ by what came before and not by the questions.
    """
    rng = random.Random(_EXAM_SEED)
    drawn = draw_held_out_tasks() | draw_held_out_talk()
    asked = [vary(task, rng) for kind in kinds for task in drawn[kind][:num_each]]
    held_out = HeldOut.of([*(task for tasks in drawn.values() for task in tasks), *asked])
    while True:
        chats = list(zip(*(rng.sample(asked, len(asked)) for _ in range(NUM_TURNS)), strict=True))
        if not any(map(_repeats_itself, chats)):
            return chats, held_out


def _repeats_itself(chat: Chat) -> bool:
    """Whether an earlier turn has the answer to a later one: the same question, or the same instance."""
    told = [task.cue or normalize_question(task.question) for task in chat]
    return len(set(told)) < len(told)


def draw_chats(num_questions: int, seed: int, held_out: HeldOut, shares: Mapping[str, float]) -> list[Chat]:
    """Chats with `num_questions` questions in all, of these kinds as often as their shares say, none held out."""
    rng = random.Random(seed)
    kinds, weights = list(shares), list(shares.values())
    lengths, how_often = list(_LENGTHS), list(_LENGTHS.values())
    chats: list[Chat] = []
    left = num_questions
    while left:
        chat: list[Task] = []
        for _ in range(min(left, rng.choices(lengths, how_often)[0])):
            is_same = chat and rng.random() < _SAME_KIND
            chat.append(_draw(chat[-1].kind if is_same else rng.choices(kinds, weights)[0], rng, held_out))
        chats.append(tuple(chat))
        left -= len(chat)
    return chats


def _draw(kind: str, rng: random.Random, held_out: HeldOut) -> Task:
    while True:
        task = vary(KINDS[kind](rng, Words()), rng)
        if not held_out.holds(task):
            return task
