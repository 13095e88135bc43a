"""`tunesmith check` finds problems of a data set with their rows; a clean data set passes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len

from tunesmith.cli import main
from tunesmith.config.data_keys import DataSection
from tunesmith.data.check import NearDuplicates, SeenTexts, check_rows
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import Ledger
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


def test_of_several_rows_alike_the_first_is_named() -> None:
    near = NearDuplicates()
    if not near.is_available:
        pytest.skip("datasketch is not installed")
    words = [f"word{number}" for number in range(200)]
    # 26 words of their own among 226: two of them are 79 % alike, each is 88 % alike to what they share
    texts = [" ".join([*words, *(f"own{row}-{number}" for number in range(26))]) for row in range(12)]
    kept = [row for row, text in enumerate(texts) if near.find(text, f"rows:{row}", keep=True) is None]
    assert len(kept) > 4
    assert near.find(" ".join(words), "rows:12", keep=False) == f"rows:{kept[0]}"


def test_errors_end_with_exit_code_1(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = [chat(f"Question {i} of many?", f"Answer {i} of many words.") for i in range(20)]
    data = write(tmp_path / "x.jsonl", clean)
    assert check(capsys, model, data)[:2][0] == 0
    held_out = write(tmp_path / "held.jsonl", [clean[3], chat("Something new here?", "Yes, it is new.")])
    code, _, found = check(capsys, model, data, "--eval-data", str(held_out))
    assert code == 1
    assert found["evaluation rows that are also in the training data"]["rows"] == [f"{held_out}:1 = {data}:4"]
    bad = write(tmp_path / "bad.jsonl", [*clean, {"messages": []}])
    code, report, _ = check(capsys, model, bad)
    assert code == 1
    [refused] = [finding for finding in report["findings"] if finding["code"]]
    assert refused | {"advice": "", "what": ""} == {
        "level": "error", "what": "", "code": "no-turns", "count": 1, "rows": [f"{bad}:21"],
        "starts": ['{"messages": []}'], "advice": "",
    }  # fmt: skip


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


DEEP = "a very/deeply/nested/folder of data/with/long names/2026-11/export-from-the-annotation-tool"
TOOLS = [{"type": "function", "function": {"name": f"get_{i}", "description": "d"}} for i in range(30)]


def odd_rows(folder: Path, text: str = "Yes or no, my friend?") -> Path:
    """One file, deep in long folders, with thirty rows that are refused for one cause, and forty odd ones."""
    folder.mkdir(parents=True)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "plain.jinja").write_text(template)
    rows = [chat(f"{text} {i}", "Yes") for i in range(40)]
    rows += [
        {**chat(f"Look {i}, please look", f"I look at it {i} times"), "tools": [tool]} for i, tool in enumerate(TOOLS)
    ]
    return write(folder / "train.jsonl", rows)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_file_and_row_are_shown_at_every_width(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    data = odd_rows(tmp_path / DEEP)
    monkeypatch.setattr("tunesmith.use.check._WIDTH", width)
    words = [
        "check",
        "--model",
        str(model),
        "--data",
        str(data),
        "--data.chat_template",
        str(data.parent / "plain.jinja"),
    ]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert all(cell_len(line) <= width for line in out.splitlines())
    lines = [line.strip() for line in out.splitlines()]
    for number in (1, 2, 3, 41, 42, 43):
        named = [i for i, line in enumerate(lines) if line.startswith(f"train.jsonl:{number} ")
                 or line == f"train.jsonl:{number}"]  # fmt: skip
        assert named, f"row {number} is not named"
        assert ("Yes or no" if number < 41 else "Look ") in " ".join(lines[named[0] : named[0] + 2])
    assert "get_1" in out.replace("\n", "")  # one cause lists the names that it is about
    assert sum("tool schema" in line for line in lines) <= 2
    assert "The first 3 rows of each are named above" in err
    assert "FILE:ROW" in err


def test_the_last_line_is_true_where_all_rows_are_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(
        tmp_path / "x.jsonl", [*(chat(f"{LONG} {i}", f"{LONG} and {i}") for i in range(3)), chat("Yes?", "Yes")]
    )
    assert main(["check", "--model", str(model), "--data", str(data), "--strict"]) == 1
    assert "Their rows are named above" in capsys.readouterr().err


def test_a_page_names_each_file_once_and_causes_once(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = odd_rows(tmp_path / DEEP, "<b>Yes</b> or no, my friend?")
    page = tmp_path / "page.html"
    main(["check", "--model", str(model), "--data", str(data), "--data.chat_template", str(data.parent / "plain.jinja"),
          "--html", str(page)])  # fmt: skip
    shown = re.sub(r'title="[^"]*"', "", page.read_text(encoding="utf-8"))
    assert shown.count(str(data)) == 1
    assert shown.count("the template drops the tool schema") == 1
    assert "<code >train.jsonl:41</code>" in shown
    assert "&lt;b&gt;Yes&lt;/b&gt;" in shown
    assert 'name="viewport"' in shown


def test_a_file_named_twice_is_not_called_a_duplicate_of_itself(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "x.jsonl", [chat("Hi", "Hello you"), chat("And?", "And me")])
    _, report, found = check(capsys, model, data, "--data", f"{tmp_path}/./x.jsonl")
    assert report["data"]["rows"] == 4
    assert [(finding["count"], finding["rows"]) for finding in found.values()] == [(2, [f"{data}:1", f"{data}:2"])]
    assert "duplicate rows" not in found


def test_a_cause_keeps_its_subject_without_the_number_of_a_turn(encoder: Encoder) -> None:
    section, ledger = DataSection(train=["x"]), Ledger()
    rows = [chat("Q", ""), chat("Q", "A b", "c", ""), chat("Q", "[INSERT NAME]")]
    for row in label_rows([RawRow("x", n, row) for n, row in enumerate(rows, 1)], encoder, section, 512):
        ledger.add(row)
    empty = next(cause for cause in ledger.refusals() if cause.code == "reply-empty")
    assert empty.count == 2
    assert empty.text.startswith("a turn (assistant) is empty")
