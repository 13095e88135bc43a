"""Advice for refused rows is a complete mapping: it reads every text column, or names what it leaves out."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import SHARED, needs_shared, raises
from test_rows_read import texts_of
from tunesmith.config.data_keys import FieldsSection
from tunesmith.errors import DataError
from tunesmith.rows.conversation import RowRefused, UnknownFormat
from tunesmith.rows.formats import parse_row
from tunesmith.rows.keys import find_fate, note_unread
from tunesmith.sources.containers import read_file

DATA = SHARED / "data"
FLAG = re.compile(r"--data\.(format|ignore_columns|fields\.\w+)((?: (?!--)(?:'[^']*'|[^\s']+))+)")


def flags_of(reason: str) -> tuple[str, dict[str, str], list[str]]:
    """Format, fields and ignored columns in the advice; an alternative in parentheses is left out."""
    advice = re.sub(r"\((?:or,|if) [^()]*\)", "", reason)
    format_name, fields, ignored = "auto", {}, []
    for key, values in FLAG.findall(advice.replace(". Formats known", " --")):
        words = shlex.split(values)
        words[-1] = words[-1].rstrip(".:")
        if key == "format":
            format_name = words[0]
        elif key == "ignore_columns":
            ignored += words
        else:
            fields[key.removeprefix("fields.")] = words[0].rstrip(".")
    return format_name, fields, ignored


def texts_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if path == "tools" and isinstance(value, str):
        yield from texts_in(json.loads(value), path)
    elif isinstance(value, str) and value.strip():
        yield path, value
    elif isinstance(value, (Mapping, list)):
        for key, below in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from texts_in(below, f"{path}.{key}" if path else str(key))


def escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def follow(rows: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Follow the advice for the first row until it is read; returns used rows and lost columns."""
    format_name, fields, ignored = "auto", dict[str, str](), list[str]()
    for _ in range(3):
        try:
            parse_row(rows[0], format_name, FieldsSection(**fields), ignored)
            break
        except RowRefused as refusal:
            named, more, left = flags_of(refusal.reason)
            format_name = named if named != "auto" else format_name
            fields |= more
            ignored += left
    used, lost = 0, []
    for row in rows:
        try:
            parsed = parse_row(row, format_name, FieldsSection(**fields), ignored)
        except UnknownFormat as refusal:
            return 0, [refusal.reason]
        except RowRefused:
            continue
        used += 1
        said = texts_of(parsed)
        for column, value in row.items():
            if column in ignored or find_fate(column, value) == "irrelevant" or column in fields.values():
                continue
            for path, text in texts_in(value, column):
                is_found = text.strip() in said or escaped(text.strip()) in said or path.rpartition(".")[2] == "from"
                is_named = any(note_unread("a row", name) in parsed.notes for name in itertools.accumulate(
                    path.split("."), lambda a, b: f"{a}.{b}"))  # fmt: skip
                if not is_found and not is_named and not path.endswith((".role", ".type")):
                    lost.append(path)
    return used, lost


def advised_files() -> Iterator[Path]:
    for path in sorted(DATA.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".gz"):
            yield path


def reason_of(row: Any) -> str:
    """Why a row is refused, "" if it is used."""
    try:
        parse_row(row, "auto", FieldsSection())
    except RowRefused as refusal:
        return refusal.reason
    return ""


@needs_shared
def test_the_advice_for_every_shared_file_reads_all_its_columns() -> None:
    advised = 0
    for path in advised_files():
        try:
            rows = [value for _, value in itertools.islice(read_file(path), 80)]
        except DataError:
            continue
        reason = reason_of(rows[0])
        if reason and flags_of(reason) == ("auto", {}, []) and not reason.startswith("turn"):
            assert re.search("without|none of them gives the speaker|message tree|images", reason), reason
            continue
        advised += 1
        used, lost = follow(rows)
        assert used, path
        assert not lost, (path, sorted(set(lost)))
    assert advised > 40


PREFERENCE = {"chosen": "good words", "rejected": "bad words"}


@pytest.mark.parametrize(
    ("row", "fields", "ignored"),
    [
        ({"instruction": "Add", "input": "1 2", **PREFERENCE}, {"output": "chosen"}, ["rejected"]),
        ({"instruction": "Add", "input": "1 2", "answer": "3"}, {"output": "answer"}, []),
        ({"instruction": "Add", "context": "1 2", "output": "x", **PREFERENCE}, {"output": "chosen"}, ["output", "rejected"]),
        ({"id": "1", "system_prompt": "Be brief", "question": "Why?", "response": "So"},
         {"prompt": "question", "completion": "response", "system": "system_prompt"}, []),
        ({"context": "In 1912", "question": "When?", "answer": "1912"},
         {"prompt": "question", "completion": "answer", "input": "context"}, []),
        ({"question": "When?", "answer": "1912", "rationale": "It says so", "choices": ["1911", "1912"]},
         {"prompt": "question", "completion": "answer", "reasoning": "rationale", "input": "choices"}, []),
        ({"prompt": "Q", "response": "A", "chat_history": [["a", "b"]]},
         {"prompt": "prompt", "completion": "response", "history": "chat_history"}, []),
        ({"prompt": "Q", "response": "A", "style": "formal", "is_safe": True},
         {"prompt": "prompt", "completion": "response"}, ["style", "is_safe"]),
        ({"my question": "Q", "my answer": "A"}, {"prompt": "my question", "completion": "my answer"}, []),
        ({"question": "Who?", "answer": "He", "text": "A man went home"},
         {"prompt": "question", "completion": "answer", "input": "text"}, []),
        ({"prompt": "Q", "completion": "A", "persona": "A pirate", "passage": "The sea"},
         {"system": "persona", "input": "passage"}, []),
        ({"prompt": "Q", "completion": "A", "instruction": "Do it"}, {"instruction": "instruction"}, []),
        ({"prompt": "Q", "completion": "A", "context": "one", "passage": "two"}, {"input": "context"}, ["passage"]),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "background": "B"},
         {}, ["background"]),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "sys": "S"},
         {"system": "sys"}, []),
        ({"prompt": "Q", "completion": "A", "instruction": "Do it", "system": ""}, {"instruction": "instruction"}, []),
        ({"instructions": "Be brief", "input": "Q", "output": "A"}, {"system": "instructions"}, []),
        ({"question": "Why?", "solution": "So", "thinking_steps": ["one", "two"]},
         {"prompt": "question", "completion": "solution", "reasoning": "thinking_steps"}, []),
        ({"question": "Why?", "contexts": ["one", "two"], "final_decision": "yes"},
         {"prompt": "question", "completion": "final_decision", "input": "contexts"}, []),
        ({"context": "In 1912", "question": "When?", "answers": {"text": ["1912"], "answer_start": [3]}},
         {"prompt": "question", "completion": "answers.text.0", "input": "context"}, []),
        ({"author": "a", "rhythmic": "r", "paragraphs": ["one", "two"]}, {"text": "paragraphs"}, ["rhythmic"]),
        ({"dialog": [{"id": "7", "speaker": "user", "words": "hello there"}, {"id": "8", "speaker": "bot", "words": "hi"}]},
         {"messages": "dialog", "role": "speaker", "content": "words"}, []),
        ({"prompt": "hi", "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}],
          "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bad"}], "score_chosen": 1.0},
         {"messages": "chosen"}, ["prompt", "rejected"]),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},
         {"messages": "chosen"}, ["rejected"]),
        ({"input": {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "t"}]},
          "preferred_output": [{"role": "assistant", "content": "good"}],
          "non_preferred_output": [{"role": "assistant", "content": "bad"}]},
         {"prompt": "input.messages", "completion": "preferred_output", "tools": "input.tools"}, ["non_preferred_output"]),
        ({"Frage": "Was?", "Antwort": "Das", "Kategorie": "X"}, {"prompt": "Frage", "completion": "Antwort"}, ["Kategorie"]),
        ({"指令": "什么", "输入": "甲", "输出": "这个"}, {"prompt": "指令", "completion": "输出", "input": "输入"}, []),
        ({"input_text": "Q", "output_text": "A"}, {"prompt": "input_text", "completion": "output_text"}, []),
        ({"source": "Hi", "target": "Hallo"}, {"prompt": "source", "completion": "target"}, []),
        ({"source": "cnn", "article": "Long", "highlights": "Short"}, {"prompt": "article", "completion": "highlights"}, []),
        ({"problem": "2 * 3?", "solution": "Two threes are six: 6", "answer": "6", "level": "1"},
         {"prompt": "problem", "completion": "solution"}, ["answer"]),
        ({"input": "Q", "content": "A", "reasoning_content": "T", "score": 9}, {"prompt": "input", "completion": "content"}, []),
        ({"data": {"fields": [{"role": "human", "content": "Q"}, {"role": "gpt", "content": "A"}]}},
         {"messages": "data.fields"}, []),
        ({"request": {"messages": [{"role": "user", "content": "Q"}]},
          "response": {"choices": [{"message": {"role": "assistant", "content": "A"}}]}},
         {"prompt": "request.messages", "completion": "response.choices.0.message"}, []),
        ({"chat": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "persona": "A pirate"},
         {"messages": "chat", "system": "persona"}, []),
        ({"id": "1", "data": ["Q1", "A1", "Q2", "A2"]}, {"messages": "data"}, []),
        ({"query": "SELECT", "question": "Which?"}, {"prompt": "question", "completion": "query"}, []),
        ({"query": "Q", "response": "A", **PREFERENCE}, {"prompt": "query", "completion": "chosen"}, ["response", "rejected"]),
    ],
)  # fmt: skip
def test_advice_is_complete(row: dict[str, Any], fields: dict[str, str], ignored: list[str]) -> None:
    with pytest.raises(UnknownFormat) as refusal:
        parse_row(row, "auto", FieldsSection())
    _, more, left = flags_of(refusal.value.reason)
    assert (more, left) == (fields, ignored), refusal.value.reason
    used, lost = follow([row])
    assert (used, lost) == (1, [])


@pytest.mark.parametrize(
    "row",
    [
        {"model_id": "gpt", "answer_id": "77"},
        {"title": "A poem", "author": "Li Bai"},
        {"title": "A poem", "chapter": "One"},
        {"id": "1", "ground_truth": ["x"]},
        {"role": "Jack", "question": "Who?", "generated": ["Jack"]},
        {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        {"content": "def f(): pass", "repo_name": "me/f", "path": "f.py"},
        {"chat_history": [{"role": "USER", "message": "Q"}], "message": "Q", "preamble": "Be brief"},
        {"personality": ["I like cats"], "utterances": [{"history": ["hello"]}]},
        {"talker": "ann", "content": "hello", "is_sender": 1},
        {"question": "Why?", "answers": [{"text": "So"}]},
        {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2]},
    ],
)
def test_no_nonsense_is_advised(row: dict[str, Any]) -> None:
    with pytest.raises(UnknownFormat) as refusal:
        parse_row(row, "auto", FieldsSection())
    assert "--data.fields" not in refusal.value.reason
    assert "rows seem to be" not in refusal.value.reason
    assert "without answers" not in refusal.value.reason


@pytest.mark.parametrize("key", ["content", "text", "value"])
@pytest.mark.parametrize("role", ["user", "assistant", "Human", "prompter"])
def test_a_row_that_is_one_turn_is_refused(role: str, key: str) -> None:
    row = {"conversation_id": "1", "role": role, key: "Hello"}
    with raises(UnknownFormat, "single-turn-row", role):
        parse_row(row, "auto", FieldsSection())
    raw = parse_row(row, "text", FieldsSection(text=key))
    assert raw.notes == ("column role is not read",)


def test_a_transcript_in_one_column_is_named() -> None:
    row = {"system": "SYSTEM: Be brief", "chat": "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"}
    with raises(UnknownFormat, "unknown-format", "chat is a transcript"):
        parse_row(row, "auto", FieldsSection())


@pytest.mark.parametrize("row", [{"query": "Q", "response": "A"}, {"input": "Q", "output": "A"}])
def test_query_response_and_input_output_are_formats(row: dict[str, Any]) -> None:
    assert [m.content for m in parse_row(row, "auto", FieldsSection()).messages] == ["Q", "A"]  # type: ignore[union-attr]


def test_empty_columns_of_other_rows_do_not_make_a_format() -> None:
    """A table of several data sets has the columns of all of them in every row."""
    rest = {"messages": [], "conversations": None, "chosen": None, "rejected": "", "images": []}
    parsed = parse_row({**rest, "instruction": "Q", "output": "A"}, "auto", FieldsSection())
    assert [m.content for m in parsed.messages] == ["Q", "A"]  # type: ignore[union-attr]
    assert parsed.notes == ()
