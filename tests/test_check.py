"""`tunesmith check` finds problems of a data set with their rows; a clean data set passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.cli import main
from tunesmith.config.schema import DataSection
from tunesmith.data.check import SeenTexts, check_rows
from tunesmith.data.labelling import label_rows
from tunesmith.encode.encoder import Encoder
from tunesmith.sources.read import RawRow

LONG = "the quick brown fox jumps over the lazy dog while the old river runs down to the sea and"


def chat(question: str, *replies: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, *({"role": "assistant", "content": r} for r in replies)]
    return {"messages": turns}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def model(model_folder: Path) -> Path:
    return model_folder


def check(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, *flags: str
) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    code = main(["check", "--model", str(model), "--data", str(data), "--json", *flags])
    report = json.loads(capsys.readouterr().out)
    return code, report, {finding["what"]: finding for finding in report["findings"]}


def test_each_thing_is_found_with_its_row(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        chat("How are you today?", "I am well, thank you."),
        chat("How are you today?", "I am well, thank you."),
        chat(f"{LONG} this", f"{LONG} that"),
        chat(f"{LONG} this", f"{LONG} those"),
        chat("What is <|im_end|> for?", "It ends a turn of a chat."),
        chat("Say nothing.", "..."),
        chat("Yes or no?", "Yes"),
        chat("Go on.", "One thing first.", "And another thing."),
        {
            "messages": [
                {"role": "user", "content": "a b"},
                {"role": "system", "content": "late"},
                {"role": "assistant", "content": "so it is"},
            ]
        },
    ]
    data = write(tmp_path / "x.jsonl", rows)
    code, report, found = check(capsys, model, data)
    assert code == 0
    assert report["data"]["rows"] == 9 == report["data"]["used"]
    assert found["duplicate rows"]["rows"] == [f"{data}:2 = {data}:1"]
    assert found["near-duplicate rows"]["rows"] == [f"{data}:4 ~ {data}:3"]
    assert next(f for what, f in found.items() if "control tokens" in what)["rows"] == [f"{data}:5"]
    assert found["a reply without a word"]["rows"] == [f"{data}:6"]
    assert found["a reply of one word"]["rows"] == [f"{data}:7"]
    assert found["two turns of one role in a row"]["rows"] == [f"{data}:8"]
    assert found["a system turn that is not the first"]["rows"] == [f"{data}:9"]
    assert check(capsys, model, data, "--strict")[0] == 1


def test_errors_end_with_exit_code_1(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = [chat(f"Question {i} of many?", f"Answer {i} of many words.") for i in range(20)]
    data = write(tmp_path / "x.jsonl", clean)
    assert check(capsys, model, data)[:2][0] == 0
    held_out = write(tmp_path / "held.jsonl", [clean[3], chat("Something new here?", "Yes, it is new.")])
    code, _, found = check(capsys, model, data, "--eval-data", str(held_out))
    assert code == 1
    assert found["evaluation rows that stand in the training data"]["rows"] == [f"{held_out}:1 = {data}:4"]
    bad = write(tmp_path / "bad.jsonl", [*clean, {"messages": []}])
    code, _, found = check(capsys, model, bad)
    assert code == 1
    [refused] = [finding for what, finding in found.items() if what.startswith("refused: ")]
    assert (refused["level"], refused["count"], refused["rows"]) == ("error", 1, [f"{bad}:21"])
    long = write(tmp_path / "long.jsonl", [*clean, chat("Tell me.", LONG * 20)])
    code, _, found = check(capsys, model, long, "--data.max_seq_len", "64")
    assert code == 1
    assert found["its last reply is cut before the stop token"]["level"] == "error"


def test_table_and_page(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "x.jsonl", [chat("Yes <b>or</b> no?", "Yes")])
    page = tmp_path / "page.html"
    assert main(["check", "--model", str(model), "--data", str(data), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "a reply of one word" in out
    assert "1: 1 used, 0 refused" in out
    assert "a reply of one word" in page.read_text(encoding="utf-8")
    clean = write(tmp_path / "y.jsonl", [chat("Yes or no?", "It is a yes.")])
    assert main(["check", "--model", str(model), "--data", str(clean)]) == 0
    assert "No problems found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [(), ("--data.train_on", "all"), ("--data.overlong", "split", "--data.max_seq_len", "24")]
)
def test_stop_tokens_that_are_trained_are_no_finding(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    data = write(tmp_path / "x.jsonl", [chat(f"{LONG} {i}?", f"{LONG} {i}!") for i in range(3)])
    _, _, found = check(capsys, model, data, *flags)
    assert "the stop token is not trained" not in found


def test_a_stop_token_that_is_not_trained_is_an_error(encoder: Encoder) -> None:
    row = next(label_rows([RawRow("x", 1, chat("Q", "A"))], encoder, DataSection(train=["x"]), 64))
    [sample] = row.samples
    sample.loss_mask[np.flatnonzero(sample.loss_mask)[-1]] = 0
    result = check_rows([row], [], encoder, DataSection(train=["x"]), 64)
    assert [(f.level, f.what, f.rows) for f in result.findings.sorted() if "stop" in f.what] == [
        ("error", "the stop token is not trained", ["x:1"])
    ]


def test_texts_are_remembered_beyond_the_recent_ones() -> None:
    seen = SeenTexts(recent=4)
    for number in range(1, 12):
        assert seen.find(f"text {number}") is None
        seen.add(f"text {number}", "a" if number < 6 else "b", number)
    assert [seen.find(f"text {n}") for n in (1, 5, 6, 11, 12)] == ["a:1", "a:5", "b:6", "b:11", None]


def test_context_that_nothing_reads_is_an_error_even_in_few_rows(encoder: Encoder) -> None:
    rows = [chat(f"What is {i}?", f"It is {i}.") for i in range(300)]
    rows[7]["messages"][1]["background"] = "Something that the reply depends on."
    raw = [RawRow("x", number, row) for number, row in enumerate(rows, 1)]
    data = DataSection(train=["x"])
    check = check_rows(label_rows(raw, encoder, data, 512), [], encoder, data, 512)
    [finding] = [f for f in check.findings.sorted() if "background" in f.what]
    assert (finding.level, finding.count) == ("error", 1)
