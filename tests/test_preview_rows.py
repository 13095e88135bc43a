"""preview --row and --only: the rows that check names, labelled as training labels them."""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

import tunesmith
from conftest import chat_row, write_jsonl
from tunesmith.config.data_keys import DataSection
from tunesmith.config.schema import PreviewConfig
from tunesmith.data.labelling import label_rows
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError, UsageError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.sources.read import RawRow
from tunesmith.use.labels import parse_rows, shorten_names
from tunesmith.use.preview import preview_rows
from tunesmith.use.turns import find_turns

Run = Callable[..., tuple[int, str, str]]
TEMPLATES = Path(__file__).parent / "templates"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of one name in deep folders; in the first, row 7 is refused and row 9 is long."""
    rows: list[Any] = [chat_row(f"Question {i}?", f"hello {i} and you") for i in range(1, 13)]
    rows[6] = {"messages": []}
    rows[8] = chat_row("Long?", "hello you and me " * 30)
    rows[10] = chat_row("Late", "hello")
    rows[10]["messages"].append({"role": "user", "content": "unanswered"})
    for name, content in (("a", rows), ("b", rows[:3])):
        (tmp_path / "data/deep" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "data/deep" / name / "train.jsonl", content)
    write_jsonl(tmp_path / "held.jsonl", [chat_row("Held out?", "hello")])
    return tmp_path


@pytest.fixture
def words(folder: Path, model_folder: Path) -> list[object]:
    files = [folder / "data/deep" / name / "train.jsonl" for name in "ab"]
    return ["preview", "--model", model_folder, "--data", *files, "--data.max_seq_len", 60, "--data.max_refused", 1,
            "--train.micro_batch_tokens", 64]  # fmt: skip


def numbers(out: str) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in out.splitlines()]
    return [(Path(row["file"]).parent.name, row["row"]) for row in rows]


def test_rows_by_every_name_that_is_meant(run: Run, words: list[object], folder: Path) -> None:
    file = folder / "data/deep/a/train.jsonl"
    for name in (file, "a/train.jsonl", "…/a/train.jsonl", "deep/a/train.jsonl"):
        code, out, err = run(*words, "--json", "--row", f"{name}:7")
        assert (code, numbers(out)) == (0, [("a", 7)]), err
    code, out, err = run(*words, "--json", "--row", "a/train.jsonl:10-12", "b/train.jsonl:2", "--row", f"{file}:1")
    assert numbers(out) == [("a", 1), ("a", 10), ("a", 11), ("a", 12), ("b", 2)], err
    code, out, err = run(
        *words, "--json", "--eval-data", folder / "held.jsonl", "--row", "held.jsonl:1", "b/train.jsonl:3"
    )
    assert [row["row"] for row in map(json.loads, out.splitlines())] == [3, 1], err


def test_a_row_alone_is_labelled_as_among_all(run: Run, words: list[object]) -> None:
    _, out, _ = run(*words, "--json", "--rows", 100)
    among = {(row["file"], row["row"]): row for row in map(json.loads, out.splitlines())}
    _, out, _ = run(*words, "--json", "--row", "a/train.jsonl:2-12", "b/train.jsonl:1-3")
    alone = [json.loads(line) for line in out.splitlines()]
    assert len(alone) == 14
    assert all(among[row["file"], row["row"]] == row for row in alone)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(["refused"], [7]), (["truncated"], [9]), (["cut"], [9]), (["noted"], [9, 11]), (["refused", "truncated"], [7, 9]),
     (["unrolled"], []), (["split"], [])],
)  # fmt: skip
def test_only_rows_of_a_kind(run: Run, words: list[object], kinds: list[str], expected: list[int]) -> None:
    code, out, err = run(*words, "--json", "--only", *kinds)
    assert (code, [n for name, n in numbers(out)]) == (0, expected)
    assert ("(15 rows read)" in err) == (not expected)
    _, out, _ = run(*words, "--json", "--only", *kinds, "--row", "a/train.jsonl:8-12")
    assert [n for name, n in numbers(out)] == [n for n in expected if n >= 8]


def test_only_is_bounded_by_rows(run: Run, words: list[object]) -> None:
    assert len(numbers(run(*words, "--json", "--only", "used")[1])) == 5
    assert len(numbers(run(*words, "--json", "--only", "used", "--rows", 8)[1])) == 8
    assert len(numbers(run(*words, "--json", "--row", "a/train.jsonl:1-12", "--rows", 2)[1])) == 2


@pytest.mark.parametrize(
    ("row", "code"),
    [("c/train.jsonl:1", "row-file-unknown"), ("a/trian.jsonl:1", "row-file-unknown"), ("train.jsonl:1", "row-file-ambiguous"),
     ("3", "row-file-ambiguous"), ("a/train.jsonl:13", "row-past-end"), ("a/train.jsonl:99-100", "row-past-end"),
     ("a/train.jsonl", "row-value"), ("a/train.jsonl:x", "row-value"), ("a/train.jsonl:0", "row-value"), (":3", "row-value"),
     ("a/train.jsonl:5-3", "row-value"), ("a/train.jsonl:-1", "row-value"), ("", "row-value")],
)  # fmt: skip
def test_what_names_no_row(fails: Any, words: list[object], row: str, code: str) -> None:
    error = fails(*words, "--row", row)
    assert error.code == code
    if code == "row-file-unknown":
        assert "a/train.jsonl" in str(error)


def test_a_line_without_a_row_and_a_limit(fails: Any, run: Run, words: list[object], folder: Path) -> None:
    file = folder / "data/deep/b/train.jsonl"
    first, *rest = file.read_text().splitlines(True)
    file.write_text(first + "\n\n" + "".join(rest))
    assert fails(*words, "--row", "b/train.jsonl:2").code == "row-not-found"
    assert run(*words, "--row", "b/train.jsonl:4")[0] == 0
    error = fails(*words, "--data.limit", 12, "--row", "b/train.jsonl:1")
    assert error.code == "row-past-end"
    assert "data.limit" in str(error)


def test_a_typed_kind_is_a_usage_error(run: Run, words: list[object]) -> None:
    assert run(*words, "--only", "refusd")[0] == 2


def test_from_python(model_folder: Path, folder: Path) -> None:
    file = folder / "data/deep/a/train.jsonl"
    given: dict[str, Any] = {"model": model_folder, "data": {"train": [file], "max_seq_len": 60}}
    assert [row.number for row in tunesmith.preview(**given, row=3)] == [3]
    assert [row.number for row in tunesmith.preview(**given, row=["train.jsonl:2", range(4, 6)])] == [2, 4, 5]
    assert [row.number for row in tunesmith.preview(**given, only="refused")] == [7]
    rows = [chat_row(f"Q{i}", f"A{i}") for i in range(9)]
    assert [row.where for row in tunesmith.preview(model=model_folder, data=rows, row=4)] == ["data[4]"]
    for row, found in ((0, [0]), ("data[8]", [8]), (range(2, 4), [2, 3]), (["data[0]", 8], [0, 8])):
        seen = tunesmith.preview(model=model_folder, data=iter(rows), row=row)
        assert [one.number for one in seen] == found
    for row in (9, "data[9]"):
        with pytest.raises(DataError) as late:
            tunesmith.preview(model=model_folder, data=rows, row=row)
        assert (late.value.code, "data[8]" in str(late.value)) == ("row-past-end", True)
    with pytest.raises(UsageError, match="counted from 1"):
        tunesmith.preview(**given, row=0)
    with pytest.raises(UsageError) as error:
        tunesmith.preview(**given, only="refusd")
    assert error.value.code == "preview-kind"
    with pytest.raises(UsageError):
        parse_rows([True])


def test_shortened_names_tell_files_apart_and_are_found_again() -> None:
    assert shorten_names(["/x/y/a.json", "/x/z/a.json", "/x/b.json", "owner/name:train"]) == {
        "/x/y/a.json": "y/a.json", "/x/z/a.json": "z/a.json", "/x/b.json": "b.json", "owner/name:train": "name:train",
    }  # fmt: skip
    assert shorten_names(["a.json", "/x/a.json"]) == {"a.json": "a.json", "/x/a.json": "x/a.json"}


CHAT = {
    "messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello user"},
        {"role": "assistant", "content": "hello me"}, {"role": "user", "content": "hello user"},
        {"role": "assistant", "content": "hello me"},
    ]
}  # fmt: skip


def turns(encoder: Encoder, row: Any, max_seq_len: int = 512, **data: Any) -> list[list[tuple[str, str]]]:
    section = DataSection(train=["x"], **data)
    [labelled] = label_rows([RawRow("x", 1, row)], encoder, section, max_seq_len)
    found = find_turns(labelled, encoder, section)
    for sample, parts in zip(labelled.samples, found, strict=True):
        assert [parts[0].start, *(part.end for part in parts)] == [
            *(part.start for part in parts),
            len(sample.input_ids),
        ]
    return [
        [(part.role, encoder.tokenizer.decode(sample.input_ids[part.start : part.end])) for part in parts]
        for sample, parts in zip(labelled.samples, found, strict=True)
    ]


def test_turns_are_told_apart_where_they_say_the_same(encoder: Encoder) -> None:
    [found] = turns(encoder, CHAT)
    assert [role for role, _ in found] == ["system", "user", "assistant", "user", "assistant"]
    assert found[1][1].strip() == "<|im_start|>user\nhello user<|im_end|>"
    assert found[4][1].strip() == "<|im_start|>assistant\nhello me<|im_end|>"


def test_turns_of_truncated_split_unrolled_and_joined_rows(encoder: Encoder) -> None:
    whole = turns(encoder, CHAT)[0]
    [cut] = turns(encoder, CHAT, max_seq_len=40)
    assert [role for role, _ in cut] == [role for role, _ in whole][: len(cut)]
    pieces = turns(encoder, CHAT, max_seq_len=30, overlong="split")
    assert len(pieces) > 1
    assert all(role for piece in pieces for role, _ in piece)
    assert [len(sample) for sample in turns(encoder, CHAT, history="unroll")] == [3, 5]
    assert [role for role, _ in turns(encoder, {"text": "hello"})[0]] == [""]


@pytest.mark.parametrize("blank", ["", " ", "\n\t\n"])
def test_a_turn_without_text_keeps_its_role(encoder: Encoder, blank: str) -> None:
    asked = {"role": "user", "content": blank}
    [found] = turns(encoder, {"messages": [asked, CHAT["messages"][2], asked, CHAT["messages"][4]]})
    assert [role for role, _ in found] == ["user", "assistant", "user", "assistant"]
    assert all(text.strip().startswith(f"<|im_start|>{role}\n") for role, text in found)
    [found] = turns(encoder, {"messages": [{"role": "system", "content": blank}, *CHAT["messages"][1:]]})
    assert [role for role, _ in found][-4:] == ["user", "assistant"] * 2


@pytest.mark.parametrize("template", sorted(TEMPLATES.rglob("*.jinja")), ids=lambda path: path.stem)
def test_what_is_trained_is_shown_as_the_assistants(template: Path, tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_tokens(
        sorted(set(re.findall(r"<[|｜][^|｜]+[|｜]>|</s>|<\w+_of_turn>", template.read_text(encoding="utf-8")))),
        special_tokens=True,
    )
    encoder = build_encoder(own, str(template), {}, datetime.datetime(2026, 1, 1))
    section = DataSection(train=["x"])
    for messages in (
        CHAT["messages"][1:],
        CHAT["messages"][1:3],
        [{"role": "user", "content": ""}, CHAT["messages"][2]],
    ):
        [row] = label_rows([RawRow("x", 1, {"messages": messages})], encoder, section, 512)
        for sample, parts in zip(row.samples, find_turns(row, encoder, section), strict=True):
            others = [part for part in parts if part.role not in ("assistant", "")]
            assert not any(sample.loss_mask[part.start : part.end].any() for part in others)


def test_page_and_terminal_name_the_roles(model_folder: Path, tmp_path: Path) -> None:
    config = PreviewConfig.model_validate(
        {"model": {"path": str(model_folder)}, "data": {"train": [str(write_jsonl(tmp_path / "d.jsonl", [CHAT]))]}}
    )
    preview = preview_rows(config, 1)
    page = preview.to_html()
    for role in ("system", "user", "assistant"):
        assert f'<div class="turn {role}"><b>{role}</b>' in page
        assert any(line.strip().startswith(f"{role} │ ") for line in str(preview).splitlines())
    assert str(tmp_path) not in page.replace(f'title="{tmp_path}/d.jsonl:1"', "")


@pytest.mark.parametrize("width", [40, 60, 120])
def test_long_lines_break_beside_their_role(model_folder: Path, tmp_path: Path, width: int) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row("hello you " * 20, "你好，世界。" * 20)])
    config = PreviewConfig.model_validate({"model": {"path": str(model_folder)}, "data": {"train": [str(data)]}})
    lines = [line for text in preview_rows(config, 1).texts(True, width) for line in text.plain.splitlines()]
    inside = [line for line in lines if "hello" in line or "世界" in line]
    assert all(cell_len(line) <= width and "│ " in line for line in inside)
    assert "".join(line.partition("│ ")[2] for line in inside).count("世界") >= 19
