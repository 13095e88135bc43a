"""Replies cut before their stop token: one severity in check, preview and train, and a limit that ends the run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, killed_after, write_jsonl
from tunesmith.config.data_keys import DataSection
from tunesmith.data.fit import NOTE_CUT_REPLY
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import Ledger
from tunesmith.encode.encoder import Encoder
from tunesmith.sources.read import RawRow

Run = Callable[..., tuple[int, str, str]]
SHORT = ("--data.max_seq_len", 40, "--train.micro_batch_tokens", 80)


def mixed(path: Path, num_long: int, num_short: int) -> Path:
    long = [chat_row(f"Say {i} long things", "hello you and me " * 20) for i in range(num_long)]
    return write_jsonl(path, [*long, *(chat_row(f"Say {i}", f"hello {i}") for i in range(num_short))])


def test_above_the_limit_check_and_train_end_with_an_error(
    run: Run, fails: Any, model_folder: Path, tmp_path: Path
) -> None:
    words = ("--model", model_folder, "--data", mixed(tmp_path / "d.jsonl", 4, 6), *SHORT)
    error = fails("train", *words, "--output", tmp_path / "run")
    assert error.code == "too-many-cut-replies"
    assert "4 of 10 replies (40.0%)" in str(error)
    assert "data.max_seq_len" in str(error)
    assert "data.max_cut_replies" in str(error)
    assert f"{tmp_path / 'd.jsonl'}:1: " in str(error)
    code, out, _ = run("check", *words, "--json")
    [found] = [f for f in json.loads(out)["findings"] if f["what"] == NOTE_CUT_REPLY]
    assert (code, found["level"], found["count"]) == (1, "error", 4)
    for flags in (("--data.max_cut_replies", 0.4), ("--data.overlong", "drop"), ("--data.overlong", "split")):
        code, _, err = run("train", *words, *flags, "--output", tmp_path / f"run-{flags[-1]}", "--train.max_steps", 1)
        assert code == 0, err


def test_the_advised_length_is_enough(fails: Any, run: Run, model_folder: Path, tmp_path: Path) -> None:
    words = ("--model", model_folder, "--data", mixed(tmp_path / "d.jsonl", 4, 6))
    error = fails("train", *words, *SHORT, "--output", tmp_path / "run")
    advised = re.search(r"\(to ([\d,]+),", str(error))
    assert advised
    code, _, err = run(
        "train", *words, "--data.max_seq_len", advised[1].replace(",", ""), "--output", tmp_path / "run",
        "--train.max_steps", 1,
    )  # fmt: skip
    assert code == 0, err


def test_below_the_limit_all_say_warning(run: Run, model_folder: Path, tmp_path: Path) -> None:
    words = ("--model", model_folder, "--data", mixed(tmp_path / "d.jsonl", 2, 18), *SHORT)
    code, out, err = run("train", *words, "--output", tmp_path / "run", "--train.max_steps", 1)
    assert code == 0, err
    [line] = [line for line in out.splitlines() if NOTE_CUT_REPLY in line]
    assert line.startswith("warning ")
    assert "2 of 20 replies (10.0%)" in line
    code, out, _ = run("check", *words, "--json")
    [found] = [f for f in json.loads(out)["findings"] if f["what"] == NOTE_CUT_REPLY]
    assert (code, found["level"]) == (0, "warning")
    code, out, _ = run("preview", *words, "--rows", 1)
    assert f"warning: {NOTE_CUT_REPLY}" in out


def test_evaluation_data_may_be_cut(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    held_out = mixed(tmp_path / "eval.jsonl", 4, 0)
    code, _, err = run(
        "train", "--model", model_folder, "--data", chats, "--eval-data", held_out, *SHORT, "--output",
        tmp_path / "run", "--train.max_steps", 1,
    )  # fmt: skip
    assert code == 0, err


def test_an_older_run_resumes_above_the_limit_to_the_same_weights(run: Run, model_folder: Path, tmp_path: Path) -> None:
    data = mixed(tmp_path / "d.jsonl", 30, 10)
    whole = tmp_path / "whole"
    code, _, err = run(
        "train", "--model", model_folder, "--data", data, *SHORT, "--output", whole, "--train.max_steps", 6,
        "--train.save_steps", 3, "--train.keep_checkpoints", 9, "--data.max_cut_replies", 1,
    )  # fmt: skip
    assert code == 0, err
    old = killed_after(whole, 0, tmp_path / "old")
    config = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text("".join(x for x in config.splitlines(True) if "max_cut_replies" not in x))
    record = json.loads((old / "run.json").read_text())
    del record["guard"]["config"]["data"]["max_cut_replies"], record["sha256"]
    (old / "run.json").write_text(json.dumps(record))
    ledger = json.loads((old / "data_ledger.json").read_text())
    del ledger["sha256"], ledger["train"]["codes"], ledger["train"]["replies"], ledger["train"]["cut_replies"]
    (old / "data_ledger.json").write_text(json.dumps(ledger))
    code, out, err = run("resume", old)
    assert code == 0, err
    assert "max_cut_replies" not in out
    assert f"{NOTE_CUT_REPLY} (30 rows)" in out
    assert (old / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    code, out, err = run("resume", old, "--train.max_steps", 8, "--allow", "data", "--data.max_seq_len", 32)
    assert code == 0, err  # reads the data anew, above the limit


def labelled(encoder: Encoder, rows: list[Any], max_seq_len: int, **data: Any) -> Ledger:
    section, ledger = DataSection(train=["x"], **data), Ledger()
    for row in label_rows([RawRow("x", n, row) for n, row in enumerate(rows, 1)], encoder, section, max_seq_len):
        ledger.add(row)
    return ledger


def test_the_share_is_of_replies_not_of_rows(encoder: Encoder) -> None:
    """A long chat that loses the end of its last reply still has all the stop tokens before."""
    pairs = [turn for i in range(9) for turn in chat_row(f"Q{i}", f"A{i}")["messages"]]
    chat = {"messages": [*pairs, *chat_row("And?", "you and me " * 90)["messages"]]}
    ledger = labelled(encoder, [chat] * 3, 250)
    assert (ledger.num_replies, ledger.num_cut) == (30, 3)
    ledger.raise_if_cut(0.1, 250)
    unrolled = labelled(encoder, [chat], 250, history="unroll")
    assert (unrolled.num_replies, unrolled.num_cut) == (10, 1)


@pytest.mark.parametrize("share", [0.0, 0.99])
def test_raw_text_has_no_replies(encoder: Encoder, share: float) -> None:
    ledger = labelled(encoder, [{"text": "hello you " * 400}], 50)
    assert (ledger.num_replies, ledger.num_cut) == (0, 0)
    ledger.raise_if_cut(share, 50)


def test_saved_ledgers_keep_the_counts(encoder: Encoder) -> None:
    ledger = labelled(encoder, [chat_row("Q", "you and me " * 90), chat_row("Q", "")], 60)
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert (again.num_replies, again.num_cut, list(again.codes.values())) == (1, 1, ["reply-empty"])
    assert again.count_reasons() == ledger.count_reasons()
