"""The files of an evaluation: what is written reads back, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import raises
from tunesmith.errors import TunesmithError
from tunesmith.evaluation.records import (
    SCORES,
    DataSummary,
    Difference,
    Evaluation,
    EvaluationFolder,
    ModelResult,
    Refusal,
    ReplyRecord,
    Score,
    read_evaluation,
    read_replies,
    write_evaluation,
)

RECORD = ReplyRecord(
    "run", "chats.jsonl:3", 0, "text", "<s>Hi\u2028", "a\nb \x1b", "a b", True, 3, 2, scores={"bleu": 9.5}
)
EVALUATION = Evaluation(
    models=[ModelResult("run", "runs/a", None, "own", {"loss": Score(1.25, 1.0, 1.5, 7)}, ["note"])],
    differences=[Difference("run", "base", {"loss": Score(-0.5, None, None, 7)})],
    data=DataSummary(["a.jsonl"], 8, 8, 7, 7, 9, [Refusal("is empty", 1, ["a.jsonl:4"])]),
    settings={"seed": 0},
    methods={"bleu": "sacrebleu"},
    fingerprint={"data": "0a"},
)


def test_an_evaluation_reads_back_as_written(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    write_evaluation(folder, EVALUATION)
    assert read_evaluation(folder) == EVALUATION
    folder.replies.write_text(RECORD.to_line() + "\n")
    assert list(read_replies(folder)) == [RECORD]
    assert len(folder.replies.read_text().split("\n")) == 2  # one line, whatever the reply


@pytest.mark.parametrize("change", [{"loss": 9}, {"models": [{}]}, {"format": 9}, {"data": None}])
def test_a_changed_evaluation_is_damaged(tmp_path: Path, change: dict) -> None:
    folder = EvaluationFolder(tmp_path)
    write_evaluation(folder, EVALUATION)
    content = json.loads(folder.result.read_text()) | change
    folder.result.write_text(json.dumps(content))
    with raises(TunesmithError, "evaluation-damaged", str(folder.result)):
        read_evaluation(folder)
    del content["sha256"]
    folder.result.write_text(json.dumps(content))
    with raises(TunesmithError, "evaluation-damaged"):
        read_evaluation(folder)


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", "{}", '"text"', "\xff", RECORD.to_line()[:-4], RECORD.to_line().replace('"turn": 0', '"turn": "0"')],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    folder = EvaluationFolder(tmp_path)
    folder.replies.write_bytes(f"{RECORD.to_line()}\n".encode() + damage.encode("latin-1", "replace") + b"\n")
    with raises(TunesmithError, "replies-damaged", f"{folder.replies}:2"):
        list(read_replies(folder))


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path / "none")
    for read in (read_evaluation, lambda folder: list(read_replies(folder))):
        with raises(TunesmithError, "evaluation-unreadable", str(folder.path)):
            read(folder)


def test_values_are_shown_as_their_kind() -> None:
    assert SCORES["stopped"].show(0.985) == "98.5%"
    assert SCORES["loss"].show(-0.5, "+") == "-0.5000"
    assert SCORES["stopped"].show(0.02, "+") == "+2.0%"
    assert SCORES["bleu"].show(None) == "-"
