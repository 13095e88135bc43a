"""Small chats with answers that can be checked, made by the seed: what the demo trains on and is asked about."""

from __future__ import annotations

import random
from collections.abc import Callable

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WEEKDAYS = ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"]
OPPOSITES = [
    *[("hot", "cold"), ("big", "small"), ("day", "night"), ("up", "down"), ("old", "young"), ("open", "closed")],
    *[("full", "empty"), ("fast", "slow"), ("wet", "dry"), ("early", "late"), ("high", "low"), ("left", "right")],
]
WHO = ["Who are you?", "What are you?", "Please introduce yourself.", "Tell me who you are."]

Pair = tuple[str, str]


def sort_digits(rng: random.Random) -> Pair:
    digits = [rng.randrange(10) for _ in range(4)]
    return f"Sort: {' '.join(map(str, digits))}", " ".join(map(str, sorted(digits)))


def compare_numbers(rng: random.Random) -> Pair:
    one, two = rng.sample(range(100), 2)
    return f"Which is larger, {one} or {two}?", str(max(one, two))


def next_day(rng: random.Random) -> Pair:
    day = rng.randrange(7)
    if rng.random() < 0.5:
        return f"Which day comes after {DAYS[day]}?", DAYS[(day + 1) % 7]
    return f"{WEEKDAYS[day]}的后一天是星期几？", WEEKDAYS[(day + 1) % 7]


def opposite(rng: random.Random) -> Pair:
    pair = rng.choice(OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    return f"What is the opposite of {word}?", other


def who_are_you(rng: random.Random) -> Pair:
    return rng.choice(WHO), "I am a small model, trained just now on your machine."


TASKS: dict[str, Callable[[random.Random], Pair]] = {
    "sort": sort_digits,
    "compare": compare_numbers,
    "next day": next_day,
    "opposite": opposite,
    "who": who_are_you,
}
# tasks whose questions are too many to learn by heart; the others have a handful and are all trained
OPEN_TASKS = ("sort", "compare")


def make_chats(num_rows: int, seed: int, held_out: set[str]) -> list[Pair]:
    """Questions with their answers; none of the held-out questions is among them."""
    rng = random.Random(seed)
    weights = [4 if name in OPEN_TASKS else 1 for name in TASKS]
    chats = []
    while len(chats) < num_rows:
        (name,) = rng.choices(list(TASKS), weights)
        question, answer = TASKS[name](rng)
        if question not in held_out:
            chats.append((question, answer))
    return chats


def make_held_out(num_each: int, seed: int) -> list[Pair]:
    """Questions of the open tasks that are kept out of training."""
    rng = random.Random(seed)
    pairs = {}
    for name in OPEN_TASKS:
        for _ in range(num_each):
            question, answer = TASKS[name](rng)
            pairs[question] = answer
    return list(pairs.items())
