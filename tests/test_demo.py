"""The demo: right answers, nothing held out in training, and a score that only learning can give."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tunesmith.demo import tasks
from tunesmith.demo.run import base_folder, run_demo
from tunesmith.demo.tasks import TASKS, draw_chats, draw_held_out, draw_statements

HELD_OUT = draw_held_out(40)


def test_at_least_eight_kinds_in_two_languages_with_right_answers() -> None:
    """Answers recomputed from the question's text alone."""
    assert len(TASKS) >= 8
    rng = random.Random(5)
    for kind, draw in TASKS.items():
        drawn = [draw(rng) for _ in range(200)]
        is_chinese = [bool(re.search(r"[\u4e00-\u9fff]", task.question)) for task in drawn]
        assert 0 < sum(is_chinese) < 200, kind
        for task in drawn:
            digits = re.findall(r"\d", task.question)
            numbers = [int(n) for n in re.findall(r"\d+", task.question)]
            if kind == "sorting":
                assert task.answer == " ".join(sorted(digits))
            elif kind == "comparing":
                assert task.answer == str(min(numbers) if "smaller" in task.question else max(numbers))
            elif kind == "counting":
                assert task.answer == str(len(re.split(r"[:：] ", task.question, maxsplit=1)[1].split(" ")))
            elif kind == "copying":
                assert task.answer == re.split(r"[:：] ?", task.question, maxsplit=1)[1]
            elif kind == "format":
                words = re.split(r"[:：] ?", task.question, maxsplit=1)[1].split(" ")
                assert re.findall(r"[a-z]+", task.answer) == words
            elif kind == "looking up":
                table, asked = re.split(r"[.。] ?", task.question.rstrip("?？"), maxsplit=1)
                name = max(
                    re.findall(r"\w+", table), key=lambda word: (word in asked and not word.isdigit()) * len(word)
                )
                assert re.search(rf"{name} {task.answer}\b", table)
            elif kind == "first and last":
                words = re.split(r"[:：] ?", task.question, maxsplit=1)[1].split(" ")
                assert task.answer == words[0 if re.search("first|第一", task.question) else -1]
            elif kind == "calendar" and "day" in task.question.split()[1:2]:
                start = next(i for i, day in enumerate(tasks.DAYS) if day in task.question)
                assert task.answer == tasks.DAYS[(start + numbers[0]) % 7]


def test_no_held_out_question_is_trained_or_pre_trained() -> None:
    questions = {task.question for task in HELD_OUT}
    chats = draw_chats(20_000, seed=0, held_out=questions)
    assert not questions & {task.question for task in chats}
    text = "\n".join(draw_statements(5_000, seed=7))
    assert not [question for question in questions if question in text]


def test_the_base_is_small_and_of_known_origin() -> None:
    files = list(base_folder().iterdir())
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {file.name for file in files}
    assert not [file for file in files if file.suffix in (".bin", ".pth", ".pt", ".pkl", ".py")]


@pytest.mark.slow
def test_shuffled_answers_teach_nothing(run, tmp_path: Path) -> None:
    """The same short run with right and with shuffled answers: only the first may score."""
    right = run_demo(tmp_path / "right", num_chats=5_000)
    shuffled = run_demo(tmp_path / "shuffled", num_chats=5_000, shuffle_answers=True)
    assert shuffled.overall <= 0.10
    assert right.overall >= 0.40
    assert right.perplexity_after < right.perplexity_before
