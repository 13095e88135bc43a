"""Preview and check show what train does, whatever decides the labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, write_jsonl
from tunesmith.config.schema import PreviewConfig
from tunesmith.data.store import open_store
from tunesmith.use.check import check_data
from tunesmith.use.preview import Preview, preview_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def long_chats(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "long.jsonl", [chat_row(f"Say {n} times", "hello you " * n) for n in range(1, 40)])


def ids_of(preview_out: str) -> list[list[int]]:
    rows = [json.loads(line) for line in preview_out.splitlines()]
    return [sample["input_ids"] for row in rows for sample in row["samples"]]


def test_micro_batch_tokens_lower_max_seq_len_in_preview_and_check_too(
    run: Run, model_folder: Path, long_chats: Path, tmp_path: Path
) -> None:
    words = [
        "--model",
        model_folder,
        "--data",
        long_chats,
        "--train.micro_batch_tokens",
        48,
        "--data.max_cut_replies",
        1,
    ]
    code, _, err = run("train", *words, "--output", tmp_path / "run", "--train.max_steps", 1)
    assert code == 0, err
    store = open_store(tmp_path / "run" / "tokens")
    code, out, _ = run("preview", *words, "--rows", 100, "--json")
    assert code == 0
    assert ids_of(out) == [store[i].input_ids.tolist() for i in range(len(store))]
    assert max(map(len, ids_of(out))) <= 48
    code, out, _ = run("check", *words, "--json")
    assert json.loads(out)["data"]["tokens"] == sum(store.lengths)


def test_a_run_file_decides_the_labels_of_preview_as_it_does_for_train(
    run: Run, model_folder: Path, long_chats: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("lora: {kind: lora}\ntrain: {micro_batch_tokens: 48, epochs: 3}\n")
    code, out, err = run("preview", tmp_path / "run.yaml", "--model", model_folder, "--data", long_chats, "--json",
                         "--rows", 100)  # fmt: skip
    assert code == 0, err
    assert max(map(len, ids_of(out))) == 48


def test_preview_refuses_lengths_that_train_refuses(run: Run, model_folder: Path, long_chats: Path) -> None:
    words = ["--model", model_folder, "--data", long_chats, "--train.micro_batch_tokens", 48, "--data.max_seq_len", 64]
    assert run("preview", *words)[0] == 1


def config_of(model: Path, data: Path, **sections: Any) -> PreviewConfig:
    return PreviewConfig.model_validate({"model": {"path": str(model)}, "data": {"train": [str(data)]}, **sections})


def test_a_preview_is_a_list_of_rows_that_shows_itself(model_folder: Path, tmp_path: Path) -> None:
    rows = [chat_row("<b>Hi</b>", "\x1b[31mred"), {"messages": []}]
    preview = preview_rows(config_of(model_folder, write_jsonl(tmp_path / "d.jsonl", rows)), 5)
    assert isinstance(preview, Preview)
    assert [row.status for row in preview] == ["used", "refused"]
    assert preview[0].samples[0].loss_mask.sum() > 0
    assert preview.to_json()[1]["reason"]
    page = preview._repr_html_()
    assert "&lt;b&gt;Hi&lt;/b&gt;" in page
    assert "<b>Hi" not in page
    assert "\x1b" not in page + str(preview)
    assert "⟦" in str(preview)


def test_check_data_prints_nothing(model_folder: Path, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = check_data(config_of(model_folder, chats))
    assert check.check.ledger.rows == 40
    assert capsys.readouterr().out == ""
