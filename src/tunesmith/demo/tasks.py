"""Small tasks in English and Chinese whose answers can be checked; made by the seed, never written by a model.

Each draw is a question with its one right answer, and the same fact as a plain statement: text for pre-training that
teaches the skill (copying, lists, tables, numbers) without the form of a chat.
"""

from __future__ import annotations

import random
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
SELF = "I am a small model, trained just now on your machine."
SELF_ZH = "我是一个小模型，刚刚在你的电脑上训练出来。"


@dataclass(frozen=True, slots=True)
class Task:
    """One question, its right answer, and the same fact as a statement."""

    kind: str
    question: str
    answer: str
    statement: str


def _digits(rng: random.Random) -> list[str]:
    return [str(rng.randrange(10)) for _ in range(rng.randint(3, 6))]


def sort_digits(rng: random.Random) -> Task:
    digits = _digits(rng)
    given, answer = " ".join(digits), " ".join(sorted(digits))
    if rng.random() < 0.6:
        question = rng.choice(["Sort these digits: {}", "Put in order: {}", "Sort from small to large: {}"]).format(
            given
        )
        return Task("sorting", question, answer, f"The digits {given} in order are {answer}.")
    question = rng.choice(["从小到大排列：{}", "把这些数字排好：{}"]).format(given)
    return Task("sorting", question, answer, f"数字 {given} 从小到大是 {answer}。")


def count_items(rng: random.Random) -> Task:
    number = rng.randint(1, 8)
    if rng.random() < 0.6:
        given = " ".join(rng.choice(WORDS) for _ in range(number))
        question = rng.choice(["How many words: {}", "Count the words: {}"]).format(given)
        return Task("counting", question, str(number), f"The words {given} are {number} words.")
    given = " ".join(rng.choice(WORDS_ZH) for _ in range(number))
    question = rng.choice(["有几个字：{}", "数一数：{}"]).format(given)
    return Task("counting", question, str(number), f"{given} 一共 {number} 个字。")


def compare_numbers(rng: random.Random) -> Task:
    one, two = rng.sample(range(100), 2)
    high, low = max(one, two), min(one, two)
    if rng.random() < 0.6:
        wants_high = rng.random() < 0.5
        question = f"Which is {'larger' if wants_high else 'smaller'}, {one} or {two}?"
        return Task("comparing", question, str(high if wants_high else low), f"{high} is larger than {low}.")
    return Task("comparing", f"{one} 和 {two} 哪个大？", str(high), f"{high} 比 {low} 大。")


def opposite(rng: random.Random) -> Task:
    if rng.random() < 0.6:
        word, other = rng.choice(OPPOSITES)[:: rng.choice([1, -1])]
        forms = [
            "What is the opposite of {}?",
            "Opposite of {}:",
            "Give the opposite of the word {}.",
            "{} - the opposite?",
        ]
        return Task("opposites", rng.choice(forms).format(word), other, f"The opposite of {word} is {other}.")
    word, other = rng.choice(OPPOSITES_ZH)[:: rng.choice([1, -1])]
    question = rng.choice(["“{}”的反义词是什么？", "{}的反义词：", "说出“{}”的反义词。"]).format(word)
    return Task("opposites", question, other, f"“{word}”的反义词是“{other}”。")


def calendar_step(rng: random.Random) -> Task:
    steps = rng.randint(1, 3)
    kind = rng.random()
    if kind < 0.35:
        day = rng.randrange(7)
        question = rng.choice(["Which day is {} after {}?", "What day comes {} after {}?"])
        span, answer = f"{steps} day{'s' * (steps > 1)}", DAYS[(day + steps) % 7]
        return Task("calendar", question.format(span, DAYS[day]), answer, f"{span} after {DAYS[day]} is {answer}.")
    if kind < 0.65:
        month = rng.randrange(12)
        question = rng.choice(["Which month is {} after {}?", "What month comes {} after {}?"])
        span, answer = f"{steps} month{'s' * (steps > 1)}", MONTHS[(month + steps) % 12]
        return Task(
            "calendar", question.format(span, MONTHS[month]), answer, f"{span} after {MONTHS[month]} is {answer}."
        )
    day = rng.randrange(7)
    answer = WEEKDAYS[(day + steps) % 7]
    question = rng.choice(["{}之后{}天是星期几？", "{}再过{}天是星期几？"]).format(WEEKDAYS[day], steps)
    return Task("calendar", question, answer, f"{WEEKDAYS[day]}之后{steps}天是{answer}。")


def translate(rng: random.Random) -> Task:
    (adjective, adjective_zh), (noun, noun_zh) = rng.choice(COLOURS), rng.choice(NOUNS)
    english, chinese = f"{adjective} {noun}", f"{adjective_zh}{noun_zh}"
    statement = f"{english} = {chinese}"
    if rng.random() < 0.5:
        return Task(
            "translation",
            rng.choice(["Translate into Chinese: {}", "{} in Chinese:"]).format(english),
            chinese,
            statement,
        )
    return Task("translation", rng.choice(["翻译成英文：{}", "{}用英文怎么说？"]).format(chinese), english, statement)


def format_list(rng: random.Random) -> Task:
    words = rng.sample(WORDS, rng.randint(2, 4))
    given = " ".join(words)
    if rng.random() < 0.5:
        answer = ", ".join(words)
        return Task(
            "format",
            rng.choice(["Join with commas: {}", "用逗号连接：{}"]).format(given),
            answer,
            f"{given}: {answer}.",
        )
    answer = "\n".join(f"- {word}" for word in words)
    return Task("format", rng.choice(["Make a list: {}", "写成列表：{}"]).format(given), answer, f"{given}:\n{answer}")


def look_up(rng: random.Random) -> Task:
    is_english = rng.random() < 0.6
    names = rng.sample(NAMES if is_english else NAMES_ZH, rng.randint(2, 4))
    table = {name: str(rng.randrange(10, 100)) for name in names}
    asked = rng.choice(names)
    if is_english:
        given = ", ".join(f"{name} {value}" for name, value in table.items())
        question = rng.choice(["{}. What number has {}?", "{}. The number of {}?"]).format(given, asked)
        rows = "\n".join(f"{name} | {value}" for name, value in table.items())
        return Task("looking up", question, table[asked], f"{rows}\nThe number of {asked} is {table[asked]}.")
    given = "，".join(f"{name} {value}" for name, value in table.items())
    question = rng.choice(["{}。{}是多少？", "{}。{}的数字？"]).format(given, asked)
    rows = "\n".join(f"{name} | {value}" for name, value in table.items())
    return Task("looking up", question, table[asked], f"{rows}\n{asked}的数字是 {table[asked]}。")


def copy_words(rng: random.Random) -> Task:
    if rng.random() < 0.6:
        given = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 5)))
        question = rng.choice(["Repeat: {}", "Say again: {}", "Copy this: {}"]).format(given)
        return Task("copying", question, given, f"{given}. {given}.")
    given = "".join(rng.choice(WORDS_ZH) for _ in range(rng.randint(3, 6)))
    return Task("copying", rng.choice(["重复：{}", "再说一遍：{}"]).format(given), given, f"{given}，{given}。")


def pick_word(rng: random.Random) -> Task:
    words = rng.sample(WORDS, rng.randint(3, 5))
    given = " ".join(words)
    which, answer = rng.choice([("first", words[0]), ("last", words[-1])])
    if rng.random() < 0.6:
        return Task(
            "first and last", f"The {which} word of: {given}", answer, f"In {given} the {which} word is {answer}."
        )
    chinese = "第一个" if which == "first" else "最后一个"
    return Task("first and last", f"{chinese}词是什么：{given}", answer, f"{given} 的{chinese}词是 {answer}。")


def who_are_you(rng: random.Random) -> Task:
    if rng.random() < 0.6:
        opening = rng.choice(["", "Hello. ", "Hi! ", "Please tell me: ", "One question: ", "Good morning. "])
        question = rng.choice(
            ["Who are you?", "What are you?", "What is your name?", "Are you a person?", "Who made you?"]
        )
        return Task("who are you", opening + question, SELF, "")
    opening = rng.choice(["", "你好，", "请问，", "早上好。", "告诉我，"])
    question = rng.choice(["你是谁？", "你叫什么名字？", "你是人吗？", "介绍一下你自己。"])
    return Task("who are you", opening + question, SELF_ZH, "")


TASKS: dict[str, Callable[[random.Random], Task]] = {
    "sorting": sort_digits,
    "counting": count_items,
    "comparing": compare_numbers,
    "opposites": opposite,
    "calendar": calendar_step,
    "translation": translate,
    "format": format_list,
    "looking up": look_up,
    "copying": copy_words,
    "first and last": pick_word,
    "who are you": who_are_you,
}
HELD_OUT_SEED = 20_260


def draw_held_out(num_each: int, kinds: Sequence[str] = tuple(TASKS)) -> list[Task]:
    """Different questions of these kinds, for asking only."""
    rng = random.Random(HELD_OUT_SEED)
    tasks: list[Task] = []
    for draw in (TASKS[kind] for kind in kinds):
        found: dict[str, Task] = {}
        while len(found) < num_each:
            task = draw(rng)
            found[task.question] = task
        tasks += found.values()
    return tasks


def draw_chats(num_rows: int, seed: int, held_out: set[str], kinds: Sequence[str] = tuple(TASKS)) -> list[Task]:
    """Tasks of these kinds equally often, none of them held out."""
    rng = random.Random(seed)
    draws = [TASKS[kind] for kind in kinds]
    chats: list[Task] = []
    while len(chats) < num_rows:
        task = rng.choice(draws)(rng)
        if task.question not in held_out:
            chats.append(task)
    return chats


def draw_statements(num_documents: int, seed: int) -> list[str]:
    """Plain documents of several statements each, for pre-training."""
    rng = random.Random(seed)
    draws = [draw for name, draw in TASKS.items() if name != "who are you"]
    documents = []
    for _ in range(num_documents):
        one_kind = rng.random() < 0.5
        draw = rng.choice(draws)
        tasks = [(draw if one_kind else rng.choice(draws))(rng) for _ in range(rng.randint(3, 10))]
        documents.append("\n".join(task.statement for task in tasks))
    return documents
