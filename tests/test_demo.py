"""The demo: right answers, nothing held out in training, and a score that only learning can give."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tunesmith.demo import tasks
from tunesmith.demo.run import run_demo
from tunesmith.demo.tasks import TASKS, draw_chats, draw_held_out, draw_statements

HELD_OUT = draw_held_out(20)
_AFTER_COLON = re.compile(r"[:：] ?")


def right_answer(kind: str, question: str) -> str | None:
    """The answer recomputed from the question's text alone; None for kinds that are not computed."""
    given = _AFTER_COLON.split(question, maxsplit=1)[-1]
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if kind == "sorting":
        return " ".join(sorted(re.findall(r"\d", question)))
    if kind == "comparing":
        return str(min(numbers) if "smaller" in question else max(numbers))
    if kind == "counting":
        return str(len(given.split(" ")))
    if kind == "copying":
        return given
    if kind == "first and last":
        return given.split(" ")[0 if re.search("first|第一", question) else -1]
    if kind == "calendar" and any(day in question for day in tasks.DAYS):
        start = next(i for i, day in enumerate(tasks.DAYS) if day in question)
        return tasks.DAYS[(start + numbers[0]) % 7]
    return None


def test_at_least_eight_kinds_in_two_languages_with_right_answers() -> None:
    assert len(TASKS) >= 8
    rng = random.Random(5)
    checked = set()
    for kind, draw in TASKS.items():
        drawn = [draw(rng) for _ in range(200)]
        assert 0 < sum(bool(re.search(r"[\u4e00-\u9fff]", task.question)) for task in drawn) < 200, kind
        for task in drawn:
            expected = right_answer(kind, task.question)
            if expected is not None:
                checked.add(kind)
                assert task.answer == expected, task
    assert len(checked) == 6


def test_no_held_out_question_is_trained_or_stands_in_the_statements() -> None:
    questions = {task.question for task in HELD_OUT}
    assert not questions & {task.question for task in draw_chats(20_000, seed=0, held_out=questions)}
    text = "\n".join(draw_statements(5_000, seed=7))
    assert not [question for question in questions if question in text]


@pytest.mark.slow
def test_the_demo_learns_and_shuffled_answers_teach_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same short run with right and with shuffled answers: only the first may score."""
    right = run_demo(tmp_path / "right", num_chats=4_000)
    out = capsys.readouterr().out
    shuffled = run_demo(tmp_path / "shuffled", num_chats=4_000, shuffle_answers=True)
    assert right.overall >= 0.25
    assert shuffled.overall <= 0.10
    assert f"talk to it:              tunesmith chat {tmp_path / 'right'}" in out
    assert "best constant answer" in out
