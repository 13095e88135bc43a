"""Templates and dataset_info.json of a wrong type, not text, too large, or not a file: one error message."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.chat_template import budget
from tunesmith.errors import TunesmithError

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]


@pytest.mark.parametrize(
    ("value", "code", "fact"),
    [
        (5, "template-not-text", "int"), (True, "template-not-text", "bool"), ({"default": 5}, "template-not-text", "int"),
        ({"default": None}, "template-not-text", "NoneType"), ({"a": {}}, "template-not-text", "dict"),
        ([{"name": "default", "template": 5}], "template-not-text", "int"), (["a"], "model-not-loadable", ""),
        ([{"name": "default"}], "model-not-loadable", ""), ([[]], "model-not-loadable", ""),
        ("x" * 1_100_000, "template-too-long", "1,000,000"),
        ([{"name": "a", "template": "x"}, {"name": "b", "template": "y"}], "template-ambiguous", "a, b"),
        ("{{ messages", "template-syntax", "line 1"),
        ("{% for x in range(99999) %}{% for y in range(99999) %}{{ x }}{% endfor %}{% endfor %}", "template-rejects", "steps"),
    ],
)  # fmt: skip
def test_the_tokenizer_s_template(
    fails: Fails, model_folder: Path, chats: Path, value: Any, code: str, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MAX_STEPS", 1_000_000)
    (model_folder / "chat_template.jinja").unlink()
    file = model_folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": value}))
    error = fails("preview", "--model", model_folder, "--data", chats)
    assert (error.code, error.exit_code) == (code, 1)
    assert fact in str(error)
    assert len(str(error)) < 1500


def make_odd(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 100)
    else:
        path.write_text("x" * 20_000_000)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device", "binary", "large"])
def test_what_is_no_template_file(run: Run, model_folder: Path, chats: Path, tmp_path: Path, kind: str) -> None:
    make_odd(tmp_path / "odd.jinja", kind)
    code, _, err = run(
        "preview", "--model", model_folder, "--data", chats, "--data.chat_template", tmp_path / "odd.jinja"
    )
    assert code == 1
    assert "odd.jinja" in err
    (model_folder / "chat_template.jinja").unlink()
    make_odd(model_folder / "chat_template.jinja", kind)
    code, _, err = run("preview", "--model", model_folder, "--data", chats)
    assert code == 1
    assert len(err) < 1500
    assert "report it as a bug" not in err


ENTRIES: list[Any] = [
    5, [], [1], "x", None, {}, {"a": 1}, {"a": {"file_name": 5}}, {"a": {"file_name": []}}, {"a": {"file_name": "../../etc/passwd"}},
    {"a": {"file_name": "d.jsonl", "columns": []}}, {"a": {"file_name": "d.jsonl", "columns": {"prompt": {}}}},
    {"a": {"file_name": "d.jsonl", "formatting": []}}, {"a": {"file_name": "d.jsonl", "formatting": {}}},
    {"a": {"file_name": "d.jsonl", "tags": 5}}, {"a": {"file_name": "d.jsonl", "tags": {"role_tag": []}}},
    {"a": {"file_name": "d.jsonl", "num_samples": "x"}}, {"a": {"file_name": "d.jsonl", "num_samples": 10**400}},
    {"a": {"file_name": "d.jsonl", "num_samples": float("nan")}}, {"a": {"file_name": "\0"}}, {"a": {"file_name": "x" * 5000}},
    {"a": {"file_name": "d.jsonl", "ranking": {}}}, {"": {"file_name": ""}}, {"\x1b[2J": {"file_name": "\x1b[2J"}},
    {"a": {"hf_hub_url": {}}}, {"a": {"hf_hub_url": "x/y", "subset": {"a": 1}, "split": []}}, {"a": {"script_url": ["x"] * 1000}},
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(ENTRIES)))
def test_dataset_info_of_other_types(run: Run, model_folder: Path, chats: Path, tmp_path: Path, place: int) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(chats, folder / "d.jsonl")
    (folder / "dataset_info.json").write_text(json.dumps(ENTRIES[place]))
    for data in (folder, f"{folder}:a"):
        code, out, err = run("preview", "--model", model_folder, "--data", data, "--rows", 1)
        assert code in (0, 1), err
        assert "report it as a bug" not in err
        assert "\x1b" not in out + err
        assert len(err) < 3000


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "binary", "large"])
def test_dataset_info_that_is_no_file(run: Run, model_folder: Path, chats: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(chats, folder / "d.jsonl")
    make_odd(folder / "dataset_info.json", kind)
    for data in (folder, f"{folder}:a"):
        code, _, err = run("preview", "--model", model_folder, "--data", data, "--rows", 1)
        assert code in (0, 1), err
        assert "report it as a bug" not in err
