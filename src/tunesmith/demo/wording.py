"""Vary how a question is written, as people do: other words, no punctuation, small letters, a greeting before it."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from tunesmith.demo.tasks import Task

_REWORD, _SMALL, _BARE, _GREET, _LOUD, _COMMAS = 0.45, 0.4, 0.4, 0.06, 0.25, 0.15  # how often each is done
_REWORDINGS: list[tuple[re.Pattern[str], list[str]]] = [
    (re.compile(pattern), forms)
    for pattern, forms in [
        (r"(?:Sort these digits|Put in order|Sort from small to large): (.+)",
         ["Sort: {0}", "Sort {0}", "Please sort these digits: {0}", "Order these digits: {0}", "Can you sort {0}?",
          "Sort the numbers {0}", "Sort these numbers: {0}"]),
        (r"(?:从小到大排列|把这些数字排好)：(.+)",
         ["排序：{0}", "请从小到大排列：{0}", "把{0}从小到大排列。", "排列：{0}"]),
        (r"(?:How many words|Count the words): (.+)",
         ["Count: {0}", "How many words are there: {0}", "Please count the words: {0}", "Number of words: {0}"]),
        (r"(?:有几个字|数一数)：(.+)", ["请数一数：{0}", "这里有几个字：{0}", "数字数：{0}", "{0} 有几个字？"]),
        (r"Which is larger, (\d+) or (\d+)\?",
         ["Which is bigger, {0} or {1}?", "What is larger, {0} or {1}?", "Which number is larger: {0} or {1}?",
          "{0} or {1}, which is larger?", "What is bigger: {0} or {1}?", "Which is greater, {0} or {1}?"]),
        (r"Which is smaller, (\d+) or (\d+)\?",
         ["Which is less, {0} or {1}?", "What is smaller, {0} or {1}?", "Which number is smaller: {0} or {1}?",
          "{0} or {1}, which is smaller?"]),
        (r"(\d+) 和 (\d+) 哪个(大|小)？",
         ["{0}和{1}哪个{2}？", "{0} 和 {1} 哪个更{2}？", "哪个{2}，{0} 还是 {1}？", "{0} 和 {1}，哪个数{2}？"]),
        (r"(?:What is the opposite of (\w+)\?|Opposite of (\w+):)",
         ["What's the opposite of {0}?", "The opposite of {0}?", "Opposite of {0}", "Tell me the opposite of {0}.",
          "Which word is the opposite of {0}?", "What is the opposite of the word {0}?"]),
        (r"“?(\w)”?的反义词(?:是什么？|：)",
         ["{0}的反义词？", "{0}的反义词是什么？", "{0}的反义词是哪个？", "请问{0}的反义词？"]),
        (r"(?:Which|What) (day|month) (?:is|comes) 1 (?:day|month) after (\w+)\?",
         ["Which {0} comes after {1}?", "What {0} is after {1}?", "Which {0} follows {1}?"]),
        (r"(?:Which|What) (day|month) (?:is|comes) (\d \w+) after (\w+)\?",
         ["{1} after {2}?", "What is {1} after {2}?", "Tell me the {0} {1} after {2}.",
          "Which {0} follows {1} after {2}?"]),
        (r"(\w+?)(?:之后|再过)(\d)天是星期几？",
         ["{0}后{1}天是星期几？", "{0}之后的第{1}天是星期几？", "{0}过{1}天是星期几？", "{0}过了{1}天是星期几？"]),
        (r"(?:Translate into Chinese: (.+)|(.+) in Chinese:)",
         ["Translate to Chinese: {0}", "How do you say {0} in Chinese?", "{0} in Chinese", "What is {0} in Chinese?",
          "Translate {0} into Chinese.", "Chinese for {0}?", "把 {0} 翻译成中文", "翻译成中文：{0}",
          "{0}用中文怎么说？"]),
        (r"(?:翻译成英文：(.+)|(.+)用英文怎么说？)",
         ["英文：{0}", "{0}的英文是什么？", "把{0}翻译成英文。", "{0}英语怎么说？", "请翻译成英文：{0}",
          "Translate into English: {0}", "{0} in English?"]),
        (r"(?:Join with commas|用逗号连接)[:：] ?(.+)",
         ["Put commas between: {0}", "With commas: {0}", "请用逗号连接：{0}"]),
        (r"(?:Make a list|写成列表)[:：] ?(.+)",
         ["Write as a list: {0}", "As a list: {0}", "List: {0}", "请写成列表：{0}"]),
        (r"(?:Repeat|Say again|Copy this): (.+)",
         ["Repeat {0}", "Please repeat: {0}", "Copy: {0}", "Say: {0}", "Repeat after me: {0}", "Write again: {0}"]),
        (r"(?:重复|再说一遍)：(.+)", ["请重复：{0}", "跟我说：{0}", "请再说一遍：{0}", "照着说：{0}"]),
        (r"The (first|last) word of: (.+)",
         ["What is the {0} word of: {1}", "Which word is {0}: {1}", "What is the {0} word: {1}", "{0} word: {1}",
          "Tell me the {0} word of: {1}"]),
        (r"(第一个|最后一个)词是什么：(.+)", ["{0}词：{1}", "哪个是{0}词：{1}", "请说{0}词：{1}"]),
    ]
]  # fmt: skip
_TALK = ("greetings", "who are you")
_ENDINGS = "?!.？！。"


def vary(task: Task, rng: random.Random) -> Task:
    """The same task written in another way; its answer stays."""
    question = task.question
    if rng.random() < _REWORD:
        question = reword(question, rng)
    if task.kind == "sorting" and rng.random() < _COMMAS:
        question = re.sub(r"(?<=\d) (?=\d)", rng.choice([", ", ","]), question)
    is_chinese = bool(re.search("[\u4e00-\u9fff]", question))
    if task.kind not in _TALK and rng.random() < _GREET:
        question = rng.choice(["你好，", "请问，", "你好！"] if is_chinese else ["Hi, ", "Hello! ", "OK, "]) + question
    if rng.random() < _BARE:
        question = question.rstrip(_ENDINGS)
    if is_chinese and rng.random() < _SMALL:  # as typed without switching the keyboard
        question = question.replace("？", "?").replace("：", ":").replace("，", ",").replace("！", "!")
    elif not is_chinese and rng.random() < _SMALL:
        question = question.lower()
    elif task.kind in _TALK and rng.random() < _LOUD:
        question = question.upper()
    return replace(task, question=question)


def reword(question: str, rng: random.Random) -> str:
    """The question in other words, where some are listed for its form."""
    for pattern, forms in _REWORDINGS:
        if match := pattern.fullmatch(question):
            parts = [part for part in match.groups() if part is not None]
            reworded = rng.choice(forms).format(*parts)
            return reworded[0].upper() + reworded[1:]
    return question
