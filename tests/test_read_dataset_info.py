"""LLaMA-Factory folders: an entry of dataset_info.json gives file, columns and tags; nothing of a row is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import SHARED, raises
from tunesmith.config.data_keys import FieldsSection
from tunesmith.errors import DataError
from tunesmith.rows.formats import parse_row
from tunesmith.sources.read import find_sources, read_rows

DEMO = SHARED / "data" / "llamafactory"
CHAT = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}


def folder_of(tmp_path: Path, entry: dict[str, Any], rows: Any, **others: Any) -> str:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"} | entry} | others))
    return f"{tmp_path}:mine"


def values(name: object) -> list[Any]:
    return [row.value for row in read_rows(find_sources([str(name)]))]


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_alpaca_columns(tmp_path: Path) -> None:
    columns = {"prompt": "q", "query": "extra", "response": "a", "system": "sys", "history": "before"}
    row = {
        "q": "Q",
        "extra": "E",
        "a": "A",
        "sys": "S",
        "before": [["q0", "a0"], ["q1", "a1"]],
        "id": 7,
        "input": "unread",
    }
    assert values(folder_of(tmp_path, {"columns": columns}, [row, row | {"extra": "", "before": None, "sys": ""}])) == [
        {
            "messages": turns(("user", "q0"), ("assistant", "a0"), ("user", "q1"), ("assistant", "a1"), ("user", "Q\nE"), ("assistant", "A")),
            "system": "S", "id": 7, "input": "unread",
        },
        {"messages": turns(("user", "Q"), ("assistant", "A")), "system": "", "id": 7, "input": "unread"},
    ]  # fmt: skip


def test_alpaca_without_columns_has_llama_factorys_names(tmp_path: Path) -> None:
    row = {"instruction": "Q", "input": "E", "output": "A", "system": "left unmapped"}
    (value,) = values(folder_of(tmp_path, {}, [row]))
    assert value["messages"] == turns(("user", "Q\nE"), ("assistant", "A"))
    assert value["system"] == "left unmapped"


def test_history_counts_without_columns_too(tmp_path: Path) -> None:
    row = {"instruction": "Q", "input": "", "output": "A", "history": [["q", "a"]]}
    (value,) = values(folder_of(tmp_path, {}, [row]))
    assert value == {"messages": turns(("user", "q"), ("assistant", "a"), ("user", "Q"), ("assistant", "A"))}


@pytest.mark.parametrize("key", ["column", "tag", "formating", "filename", "num_sample"])
def test_a_typo_in_an_entry_is_an_error(tmp_path: Path, key: str) -> None:
    with raises(DataError, "unknown-entry-key", f"'{key}'", "Did you mean"):
        values(folder_of(tmp_path, {key: "x"}, [{"instruction": "Q", "output": "A"}]))


def test_an_unmapped_column_never_takes_the_place_of_a_mapped_one(tmp_path: Path) -> None:
    columns = {"prompt": "q", "response": "a", "system": "sys"}
    row = {"q": "Q", "a": "A", "sys": "S", "system": "T", "messages": "M"}
    (value,) = values(folder_of(tmp_path, {"columns": columns}, [row]))
    assert value == {
        "messages": turns(("user", "Q"), ("assistant", "A")), "system": "S", "system (unmapped)": "T", "messages (unmapped)": "M",
    }  # fmt: skip


def test_sharegpt_tags(tmp_path: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "H", "assistant_tag": "B", "observation_tag": "O",
            "function_tag": "F", "system_tag": "S"}  # fmt: skip
    call = json.dumps({"name": "f", "arguments": {"x": None}})
    row = {
        "chat": [
            {"who": "S", "said": "s"}, {"who": "H", "said": "h", "loss": False}, {"who": "F", "said": call},
            {"who": "O", "said": "o"}, {"who": "B", "said": "b", "role": "own"}, {"who": "X", "said": "x"}, "junk", {},
        ],
        "tools": "[]", "t": '[{"name": "f"}]',
    }  # fmt: skip
    entry = CHAT | {"columns": {"messages": "chat", "tools": "t"}, "tags": tags}
    (value,) = values(folder_of(tmp_path, entry, [row]))
    assert value == {
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "h", "loss": False},
            {"role": "function_call", "content": call}, {"role": "tool", "content": "o"},
            {"role": "assistant", "content": "b", "role (unmapped)": "own"}, {"role": "X", "content": "x"}, "junk", {},
        ],
        "tools": '[{"name": "f"}]', "tools (unmapped)": "[]",
    }  # fmt: skip


def test_openai_turns_keep_their_calls(tmp_path: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    chat = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    entry = {"formatting": "openai", "columns": {"messages": "messages"}, "tags": tags}
    assert (
        values(folder_of(tmp_path, entry, [{"messages": chat}, {"messages": json.dumps(chat)}]))
        == [{"messages": chat}] * 2
    )


def test_an_entry_without_an_answer_is_raw_text(tmp_path: Path) -> None:
    rows = [{"content": "Once upon a time.", "url": "u"}]
    assert values(folder_of(tmp_path, {"columns": {"prompt": "content"}}, rows)) == [
        {"text": "Once upon a time.", "url": "u"}
    ]


def test_numbers_keep_their_spelling_and_broken_history_stays_visible(tmp_path: Path) -> None:
    name = folder_of(tmp_path, {"columns": {"prompt": "q", "query": "n", "response": "a", "history": "h"}}, [])
    (tmp_path / "rows.json").write_text('[{"q": "round", "n": 0.10, "a": "A", "h": ["x"]}]')
    (value,) = values(name)
    assert value["messages"][0]["content"] == "round\n0.10"
    assert value["history"] == ["x"]


def test_names_files_and_samples(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "output": "a"} for i in range(9)]
    name = folder_of(tmp_path, {"num_samples": 3}, rows, parts={"file_name": "parts"}, gone={"file_name": "row.json"})
    assert len(values(name)) == 3
    (tmp_path / "parts").mkdir()
    for part in ("a.json", "b.json"):
        (tmp_path / "parts" / part).write_text(json.dumps(rows[:2]))
    assert len(values(f"{tmp_path}:parts")) == 4
    assert [row.where for row in read_rows(find_sources([f"{tmp_path}:parts", name]))][-1] == f"{tmp_path}/rows.json:3"
    with raises(DataError, "file-not-found", "gone: ", "row.json", "rows.json?"):
        find_sources([f"{tmp_path}:gone"])
    with raises(DataError, "several-datasets", "mine, parts, gone"):
        find_sources([str(tmp_path)])
    with raises(DataError, "unknown-dataset", "'mind'", ":mine?", "mine, parts, gone"):
        find_sources([f"{tmp_path}:mind"])


def test_the_only_entry_needs_no_name(tmp_path: Path) -> None:
    folder_of(tmp_path, {}, [{"instruction": "Q", "output": "A"}])
    assert values(tmp_path) == [{"messages": turns(("user", "Q"), ("assistant", "A"))}]


@pytest.mark.parametrize(
    "content", ['{"features": {"a": {}}, "splits": {}}', "[]", "{}", "{", '{"default": {"features": {}}}']
)
def test_a_dataset_info_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}')
    (tmp_path / "dataset_info.json").write_text(content)
    sources = find_sources([str(tmp_path)])
    assert tmp_path / "rows.jsonl" in sources.files
    assert not sources.entries


@pytest.mark.parametrize(
    ("entry", "code", "fact"),
    [
        ({"ranking": True}, "preference-data", "ranking"),
        ({"file_name": None, "ms_hub_url": "a/b"}, "entry-place-unsupported", "ms_hub_url a/b"),
        ({"file_name": None, "script_url": "s"}, "entry-place-unsupported", "script_url s"),
        ({"file_name": None, "cloud_file_name": "s3"}, "entry-place-unsupported", "cloud_file_name s3"),
        ({"columns": {"promt": "q"}}, "unknown-entry-key", "'promt' in columns. Known: prompt,"),
        ({"tags": {"user": "q"}}, "unknown-entry-key", "'user' in tags"),
        ({"columns": ["q"]}, "entry-not-names", "columns"),
        ({"formatting": "chat"}, "unknown-formatting", "'chat'. Known: alpaca, sharegpt, openai"),
        ({"num_samples": -1}, "bad-num-samples", "-1"),
        ({"columns": {"prompt": "q", "response": "a"}}, "entry-column-missing", "q (columns.prompt). Keys found: x"),
    ],
)
def test_entries_that_cannot_be_read_say_why(tmp_path: Path, entry: dict[str, Any], code: str, fact: str) -> None:
    with raises(DataError, code, "dataset_info.json: mine: ", fact):
        values(folder_of(tmp_path, entry, [{"x": 1}]))


def test_hub_entries_are_given_to_the_hub(tmp_path: Path) -> None:
    name = folder_of(tmp_path, CHAT | {"hf_hub_url": "acme/chats", "subset": "zh", "split": "test"}, [])
    sources = find_sources([name])
    assert sources.hub == [("acme/chats", "zh", "test")]
    assert sources.hub_entries[0].is_chat


def test_kto_rows_keep_their_verdict(tmp_path: Path) -> None:
    entry = CHAT | {
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    rows = [{"messages": turns(("user", "Q"), ("assistant", "A")), "label": False}]
    assert values(folder_of(tmp_path, entry, rows))[0]["kto_tag"] is False


@pytest.mark.skipif(not DEMO.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("alpaca_en_demo.json", {}),
        ("glaive_toolcall_en_demo.json", {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}),
        ("identity.json", {}),
        ("v1_sft_demo.jsonl", {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}}),
    ],
)  # fmt: skip
def test_demo_files_give_the_chats_that_they_give_without_an_entry(
    tmp_path: Path, file: str, entry: dict[str, Any]
) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"demo": {"file_name": str(DEMO / file)} | entry}))
    plain, mapped = values(DEMO / file)[:50], values(f"{tmp_path}:demo")[:50]
    assert mapped
    for one, other in zip(plain, mapped, strict=True):
        assert outcome(one) == outcome(other)


def outcome(row: Any) -> Any:
    try:
        parsed: Any = parse_row(row, "auto", FieldsSection())
    except Exception as error:
        return str(error)
    return parsed.messages, parsed.tools
