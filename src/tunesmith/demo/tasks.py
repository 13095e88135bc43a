"""Draw small tasks in English and Chinese with checkable answers, from a seed.

Each draw is a question with its one right answer, and a plain-text cue for the same answer: text for pre-training that
teaches the skill (copying, lists, tables, numbers) without the form of a chat.

The order and number of random draws in this file decide which tasks are held out, and the packaged base was
pre-trained without exactly those: a change here needs a new base (scripts/make_base.py). The wordings of chats are
varied in wording.py instead.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"]  # fmt: skip
WEEKDAYS = ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"]
NAMES = ["Ann", "Bob", "Eve", "Tom", "Sam", "Kim", "Leo", "Mia", "Max", "Zoe", "Ben", "Joy"]
NAMES_ZH = ["小明", "小红", "小华", "小丽", "小刚", "小芳", "大伟", "阿强"]
OPPOSITES = [("hot", "cold"), ("big", "small"), ("day", "night"), ("up", "down"), ("old", "young"), ("open", "closed"),
             ("full", "empty"), ("fast", "slow"), ("wet", "dry"), ("early", "late"), ("high", "low"), ("left", "right"),
             ("good", "bad"), ("long", "short"), ("light", "dark"), ("rich", "poor")]  # fmt: skip
OPPOSITES_ZH = [("大", "小"), ("高", "低"), ("长", "短"), ("多", "少"), ("好", "坏"), ("快", "慢"), ("冷", "热"),
                ("黑", "白"), ("上", "下"), ("左", "右"), ("新", "旧"), ("远", "近")]  # fmt: skip
COLOURS = [("red", "红色的"), ("white", "白色的"), ("black", "黑色的"), ("green", "绿色的"), ("blue", "蓝色的"),
           ("yellow", "黄色的"), ("big", "大的"), ("small", "小的"), ("old", "老的"), ("new", "新的")]  # fmt: skip
NOUNS = [("cat", "猫"), ("dog", "狗"), ("horse", "马"), ("bird", "鸟"), ("fish", "鱼"), ("tree", "树"),
         ("flower", "花"), ("house", "房子"), ("door", "门"), ("table", "桌子"), ("book", "书"), ("boat", "船"),
         ("hat", "帽子"), ("cup", "杯子"), ("stone", "石头"), ("star", "星星")]  # fmt: skip
WORDS = ["river", "stone", "garden", "letter", "morning", "window", "bread", "silver", "mountain", "paper", "summer",
         "voice", "street", "hand", "fire", "water", "road", "forest", "winter", "music", "king", "ship", "field",
         "cloud", "glass", "apple", "chair", "candle", "bridge", "shadow"]  # fmt: skip
WORDS_ZH = ["山", "水", "风", "月", "花", "鸟", "春", "秋", "天", "地", "人", "马", "云", "雨", "书", "酒", "江", "雪"]
NUM_ITEMS = 3  # of lists to copy: one length, because a model of this size copies by position, not yet by content
_PUNCTUATION = re.compile(r"[^\w\s]|_")


@dataclass(frozen=True, slots=True)
class Words:
    """Words to make tasks of: the lists above, or larger ones for pre-training, so that no skill depends on them."""

    english: Sequence[str] = tuple(WORDS)
    chinese: Sequence[str] = tuple(WORDS_ZH)
    names: Sequence[str] = tuple(NAMES)
    names_zh: Sequence[str] = tuple(NAMES_ZH)


@dataclass(frozen=True, slots=True)
class Task:
    """One question and its right answer.

    Attributes:
        cue: plain text that the answer completes; empty for small talk, which is not pre-trained.
        is_open: the kind has so many instances (sorting) that some can be held out in any wording; of a closed kind
            (opposites) every instance is trained, and only wordings are held out.
    """

    kind: str
    question: str
    answer: str
    cue: str
    is_open: bool = True


def sort_digits(rng: random.Random, words: Words) -> Task:
    digits = [str(rng.randrange(10)) for _ in range(4)]
    given, answer = " ".join(digits), " ".join(sorted(digits))
    if rng.random() < 0.6:
        form = rng.choice(["Sort these digits: {}", "Put in order: {}", "Sort from small to large: {}"])
        return Task("sorting", form.format(given), answer, f"{given}, in order:")
    form = rng.choice(["从小到大排列：{}", "把这些数字排好：{}"])
    return Task("sorting", form.format(given), answer, f"{given}，从小到大：")


def count_items(rng: random.Random, words: Words) -> Task:
    number = rng.randint(1, 8)
    if rng.random() < 0.6:
        given = " ".join(rng.choice(words.english) for _ in range(number))
        form = rng.choice(["How many words: {}", "Count the words: {}"])
        return Task("counting", form.format(given), str(number), f"{given}, number of words:")
    given = " ".join(rng.choice(words.chinese) for _ in range(number))
    form = rng.choice(["有几个字：{}", "数一数：{}"])
    return Task("counting", form.format(given), str(number), f"{given}，字数：")


def compare_numbers(rng: random.Random, words: Words) -> Task:
    one, two = rng.sample(range(100), 2)
    high, low = max(one, two), min(one, two)
    if rng.random() < 0.6:
        which, answer = rng.choice([("larger", high), ("smaller", low)])
        return Task("comparing", f"Which is {which}, {one} or {two}?", str(answer), f"{one} and {two}, the {which}:")
    which, answer = rng.choice([("大", high), ("小", low)])
    return Task("comparing", f"{one} 和 {two} 哪个{which}？", str(answer), f"{one} 和 {two}，较{which}：")


def opposite(rng: random.Random, words: Words) -> Task:
    if rng.random() < 0.6:
        word, other = rng.choice(OPPOSITES)[:: rng.choice([1, -1])]
        forms = ["What is the opposite of {}?", "Opposite of {}:", "Give the opposite of the word {}.",
                 "{} - the opposite?"]  # fmt: skip
        return Task("opposites", rng.choice(forms).format(word), other, f"{word}, the opposite:", is_open=False)
    word, other = rng.choice(OPPOSITES_ZH)[:: rng.choice([1, -1])]
    question = rng.choice(["“{}”的反义词是什么？", "{}的反义词：", "说出“{}”的反义词。"]).format(word)
    return Task("opposites", question, other, f"{word}，反义词：", is_open=False)


def calendar_step(rng: random.Random, words: Words) -> Task:
    steps, kind = rng.randint(1, 3), rng.random()
    if kind < 0.65:
        unit, names = ("day", DAYS) if kind < 0.35 else ("month", MONTHS)
        now = rng.randrange(len(names))
        span, answer = f"{steps} {unit}{'s' * (steps > 1)}", names[(now + steps) % len(names)]
        question = rng.choice(["Which {} is {} after {}?", "What {} comes {} after {}?"])
        return Task(
            "calendar", question.format(unit, span, names[now]), answer, f"{span} after {names[now]}:", is_open=False
        )
    day = rng.randrange(7)
    answer = WEEKDAYS[(day + steps) % 7]
    question = rng.choice(["{}之后{}天是星期几？", "{}再过{}天是星期几？"]).format(WEEKDAYS[day], steps)
    return Task("calendar", question, answer, f"{WEEKDAYS[day]}之后{steps}天：", is_open=False)


def translate(rng: random.Random, words: Words) -> Task:
    (adjective, adjective_zh), (noun, noun_zh) = rng.choice(COLOURS), rng.choice(NOUNS)
    english, chinese = f"{adjective} {noun}", f"{adjective_zh}{noun_zh}"
    if rng.random() < 0.5:
        form = rng.choice(["Translate into Chinese: {}", "{} in Chinese:"])
        return Task("translation", form.format(english), chinese, f"{english}, Chinese:")
    form = rng.choice(["翻译成英文：{}", "{}用英文怎么说？"])
    return Task("translation", form.format(chinese), english, f"{chinese}，英文：")


def format_list(rng: random.Random, words: Words) -> Task:
    items = [rng.choice(words.english) for _ in range(NUM_ITEMS)]
    given = " ".join(items)
    if rng.random() < 0.5:
        form = rng.choice(["Join with commas: {}", "用逗号连接：{}"])
        return Task("format", form.format(given), ", ".join(items), f"{given}, with commas:")
    form = rng.choice(["Make a list: {}", "写成列表：{}"])
    return Task("format", form.format(given), "\n".join(f"- {item}" for item in items), f"{given}, as a list:")


def look_up(rng: random.Random, words: Words) -> Task:
    is_english = rng.random() < 0.6
    names = rng.sample(list(words.names if is_english else words.names_zh), 2)
    table = {name: str(rng.randrange(10, 100)) for name in names}
    asked = rng.choice(names)
    cue = "\n".join(f"{name} | {value}" for name, value in table.items()) + f"\n{asked} |"
    if is_english:
        given = ", ".join(f"{name} {value}" for name, value in table.items())
        form = rng.choice(["{}. What number has {}?", "{}. The number of {}?"])
    else:
        given = "，".join(f"{name} {value}" for name, value in table.items())
        form = rng.choice(["{}。{} 是多少？", "{}。{} 的数字？"])
    return Task("looking up", form.format(given, asked), table[asked], cue)


def copy_items(rng: random.Random, words: Words) -> Task:
    if rng.random() < 0.6:
        given = " ".join(rng.choice(words.english) for _ in range(NUM_ITEMS))
        form = rng.choice(["Repeat: {}", "Say again: {}", "Copy this: {}"])
        return Task("copying", form.format(given), given, f"{given}, again:")
    given = "、".join(rng.choice(words.chinese) for _ in range(NUM_ITEMS))
    return Task("copying", rng.choice(["重复：{}", "再说一遍：{}"]).format(given), given, f"{given}，再说一遍：")


def pick_item(rng: random.Random, words: Words) -> Task:
    items = [rng.choice(words.english) for _ in range(NUM_ITEMS)]
    given = " ".join(items)
    which, which_zh, answer = rng.choice([("first", "第一个", items[0]), ("last", "最后一个", items[-1])])
    if rng.random() < 0.6:
        return Task("first and last", f"The {which} word of: {given}", answer, f"{given}, the {which}:")
    return Task("first and last", f"{which_zh}词是什么：{given}", answer, f"{given}，{which_zh}：")


TASKS: dict[str, Callable[[random.Random, Words], Task]] = {
    "sorting": sort_digits,
    "counting": count_items,
    "comparing": compare_numbers,
    "opposites": opposite,
    "calendar": calendar_step,
    "translation": translate,
    "format": format_list,
    "looking up": look_up,
    "copying": copy_items,
    "first and last": pick_item,
}
_HELD_OUT_SEED, HELD_OUT_EACH = 20_260, 40  # the base was pre-trained without these: another draw needs another base


def draw_held_out_tasks() -> dict[str, list[Task]]:
    """The held-out tasks of each kind, for asking only: neither the base nor the demo may train on them."""
    rng = random.Random(_HELD_OUT_SEED)
    drawn: dict[str, list[Task]] = {}
    for kind, draw in TASKS.items():
        found: dict[str, Task] = {}
        while len(found) < HELD_OUT_EACH:
            task = draw(rng, Words())
            found[task.question] = task
        drawn[kind] = list(found.values())
    return drawn


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What must not be trained: the questions in any spelling, and of open kinds the instances in any wording."""

    questions: frozenset[str]
    cues: frozenset[str]

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> HeldOut:
        return cls(
            frozenset(normalize_question(t.question) for t in tasks), frozenset(t.cue for t in tasks if t.is_open)
        )

    def holds(self, task: Task) -> bool:
        return task.cue in self.cues or normalize_question(task.question) in self.questions


def normalize_question(question: str) -> str:
    """A question without case, punctuation and repeated spaces: "Who are you?" and "who are you" are one."""
    return " ".join(_PUNCTUATION.sub(" ", question.casefold()).split())
