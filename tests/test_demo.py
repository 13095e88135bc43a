"""The demo: correct answers, no held-out question in training, and a score that only learning can reach."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tunesmith.demo import tasks
from tunesmith.demo.drills import draw_drills, words_of_books
from tunesmith.demo.run import SHARES, base_folder, run_demo
from tunesmith.demo.tasks import TASKS, HeldOut, Words, draw_chats, draw_held_out

HELD_OUT = draw_held_out()
_AFTER_COLON = re.compile(r"[:：] ?")


def right_answer(kind: str, question: str) -> str | None:
    """The answer recomputed from the question's text alone; None for kinds that are not computed."""
    given = _AFTER_COLON.split(question, maxsplit=1)[-1]
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if kind == "sorting":
        return " ".join(sorted(re.findall(r"\d", question)))
    if kind == "comparing":
        return str(min(numbers) if re.search("smaller|小", question) else max(numbers))
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
    assert len(SHARES) >= 8
    rng = random.Random(5)
    checked = set()
    for kind, draw in TASKS.items():
        drawn = [draw(rng, Words()) for _ in range(200)]
        assert 0 < sum(bool(re.search(r"[\u4e00-\u9fff]", task.question)) for task in drawn) < 200, kind
        for task in drawn:
            expected = right_answer(kind, task.question)
            if expected is not None:
                checked.add(kind)
                assert task.answer == expected, task
    assert len(checked) == 6


def test_nothing_held_out_is_trained_or_pre_trained() -> None:
    """Neither a question nor, for kinds with many instances, an instance in other words is in both sets."""
    held_out = HeldOut.of(HELD_OUT)
    chats = draw_chats(20_000, seed=0, held_out=held_out, shares=SHARES)
    assert not held_out.questions & {task.question for task in chats}
    assert not held_out.cues & {task.cue for task in chats}
    words = words_of_books(["The river was wide and the road was long", "山水之间有人家"])
    prompts = {row["prompt"] for row in draw_drills(20_000, 2, words, held_out)}
    assert not {f"{cue}\n" for cue in held_out.cues} & prompts
    assert not [question for question in held_out.questions if question in "\n".join(prompts)]
    unguarded = {row["prompt"] for row in draw_drills(20_000, 2, words, HeldOut.of([]))}
    assert {f"{cue}\n" for cue in held_out.cues} & unguarded  # so it was the guard that kept them out


def test_the_base_in_the_package_is_small_and_safe() -> None:
    files = list(base_folder().iterdir())
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}


@pytest.mark.slow
def test_the_demo_learns_and_shuffled_answers_teach_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same short run with correct and with shuffled answers: only the first one may score."""
    right = run_demo(tmp_path / "right", num_chats=4_000)
    out = capsys.readouterr().out
    shuffled = run_demo(tmp_path / "shuffled", num_chats=4_000, shuffle_answers=True)
    assert right.overall >= 0.25
    assert shuffled.overall <= 0.10
    assert f"talk to it:              tunesmith chat {tmp_path / 'right'}" in out
    assert "best constant answer" in out
