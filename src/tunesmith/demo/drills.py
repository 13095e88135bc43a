"""Make rows that teach a small base model skills which books do not teach: copying, lists, numbers.

A drill is a prompt with its one right completion, and only the completion is trained: random text cannot be predicted,
so training on it adds only noise. Half of the drills use words of the books, so that the skill does not depend on a
word list.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator

from tunesmith.demo.tasks import TASKS, HeldOut, Words

_NUM_ENGLISH, _NUM_CHINESE = 2_000, 800

Drill = dict[str, str]  # a row of data: prompt and completion


def words_of_books(texts: Iterable[str]) -> Words:
    """The commonest English words and Chinese characters."""
    words, chars = Counter[str](), Counter[str]()
    for text in texts:
        words.update(word for word in text.split() if len(word) > 2 and word.isascii() and word.isalpha())
        chars.update(char for char in text if "\u4e00" <= char <= "\u9fff")
    english = [word for word, _ in words.most_common(_NUM_ENGLISH)]
    chinese = [char for char, _ in chars.most_common(_NUM_CHINESE)]
    return Words(english, chinese, names=english, names_zh=chinese)


def draw_drills(number: int, seed: int, words: Words, held_out: HeldOut) -> Iterator[Drill]:
    """The demo's kinds of task as plain text: half with the demo's words, half with those of the books."""
    rng = random.Random(seed)
    draws = list(TASKS.values())
    while number > 0:
        task = rng.choice(draws)(rng, words if rng.random() < 0.5 else Words())
        if not held_out.holds(task):
            number -= 1
            yield {"prompt": f"{task.cue}\n", "completion": task.answer}
