"""Runs with data.share_prefix: what auto decides, resuming them, several processes, and what turns it off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import WORDS, chat_row, killed_after, raises, save_folder, tiny_config, write_jsonl
from test_processes import losses, torchrun
from test_resume import BUSY, records, weights
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.files import read_sealed, sealed, write_text_atomic

Run = Callable[..., tuple[int, str, str]]
FLAGS = ("--data.max_seq_len", 128, "--train.micro_batch_tokens", 256, "--optim.lr", 3e-3, "--data.history", "unroll")


@pytest.fixture
def long_chats(tmp_path: Path) -> Path:
    """Chats of several turns; unrolled, their samples share all but the last turns."""
    words = WORDS.split()
    rows = []
    for row in range(24):
        turns = []
        for turn in range(4):
            text = " ".join(words[(row * 5 + turn * 3 + n) % len(words)] for n in range(4 + row % 3))
            turns += chat_row(f"{row} {text}", text)["messages"]
        rows.append({"messages": turns})
    return write_jsonl(tmp_path / "long.jsonl", rows)


def train(run: Run, model: Path, data: Path, output: Path, *flags: object) -> str:
    code, out, err = run("train", "--model", model, "--data", data, "--output", output, *flags)
    assert code == 0, err
    return out


def shares(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_sealed(folder / "data_ledger.json")["share_prefix"]
    assert read_sealed(folder / "run.json")["guard"]["shares_prefixes"] == found["is_on"]
    return found


def test_auto_shares_where_rows_are_unrolled(run: Run, model_folder: Path, long_chats: Path, tmp_path: Path) -> None:
    """The summary and the ledger say what it saves; a step counts the tokens that it computes."""
    out = train(run, model_folder, long_chats, tmp_path / "auto", *FLAGS, "--train.epochs", 1, "--train.log_steps", 1)
    found = shares(tmp_path / "auto")
    assert found["is_on"]
    assert found["ratio"] > 1.5
    assert "shared prefixes are computed once" in out
    assert f"{found['ratio']:.2f} tokens for each computed" in (tmp_path / "auto" / "report.html").read_text()
    train(run, model_folder, long_chats, tmp_path / "off", *FLAGS, "--train.epochs", 1, "--data.share_prefix", "off",
          "--train.log_steps", 1)  # fmt: skip
    assert not shares(tmp_path / "off")["is_on"]
    (on, *_), (off, *_) = (records(tmp_path / name)[::-1] for name in ("auto", "off"))
    assert on["supervised_tokens"] == off["supervised_tokens"]
    assert off["tokens"] / on["tokens"] == pytest.approx(found["ratio"], rel=0.02)
    assert on["step"] < off["step"]


def test_auto_does_not_share_what_is_not_worth_it(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    out = train(run, model_folder, chats, tmp_path / "run", *FLAGS[:4], "--train.max_steps", 2)
    assert not shares(tmp_path / "run")["is_on"]
    assert "not shared" in out
    on = train(
        run, model_folder, chats, tmp_path / "on", *FLAGS[:4], "--train.max_steps", 2, "--data.share_prefix", "on"
    )
    assert shares(tmp_path / "on")["is_on"]
    assert "shared prefixes are computed once" in on


BUSY_FLAGS = (*BUSY[4:], *FLAGS)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_resumed_anywhere_the_weights_are_the_same(
    run: Run, tokenizer: Any, long_chats: Path, tmp_path: Path, name: str
) -> None:
    model = save_folder(tmp_path / "model", tiny_config(name, initializer_range=0.1), tokenizer)
    whole = tmp_path / "whole"
    train(run, model, long_chats, whole, *BUSY_FLAGS)
    assert shares(whole)["is_on"]
    for step in (0, 4, 10) if name == "qwen3" else (4,):
        part = killed_after(whole, step, tmp_path / f"from-{step}")
        code, _, err = run("resume", part)
        assert code == 0, err
        assert weights(part) == weights(whole)
        assert records(part) == records(whole)


def test_a_run_of_an_earlier_version_is_resumed_as_it_began(
    run: Run, model_folder: Path, long_chats: Path, tmp_path: Path
) -> None:
    """Without the key, and where auto would share by now."""
    whole = tmp_path / "whole"
    train(run, model_folder, long_chats, whole, *BUSY_FLAGS, "--data.share_prefix", "off")
    part = killed_after(whole, 4, tmp_path / "part")
    for path in (part / "run.json", *part.glob("checkpoints/step-*/manifest.json")):
        content = read_sealed(path)
        del content["guard"]["shares_prefixes"], content["guard"]["config"]["data"]["share_prefix"]
        write_text_atomic(path, sealed({key: value for key, value in content.items() if key != "seal"}))
    config = (part / "config.yaml").read_text()
    (part / "config.yaml").write_text("".join(line for line in config.splitlines(True) if "share_prefix" not in line))
    code, _, err = run("resume", part)
    assert code == 0, err
    assert weights(part) == weights(whole)
    assert not shares(part)["is_on"]


def test_another_choice_on_resume_needs_to_be_allowed(
    run: Run, fails: Callable[..., TunesmithError], model_folder: Path, long_chats: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    train(run, model_folder, long_chats, whole, *BUSY_FLAGS)
    part = killed_after(whole, 4, tmp_path / "part")
    error = fails("resume", part, "--data.share_prefix", "off")
    assert error.code == "run-changed"
    assert "--allow batch" in str(error)
    code, _, err = run("resume", part, "--data.share_prefix", "off", "--allow", "batch")
    assert code == 0, err
    assert not shares(part)["is_on"]
    same = killed_after(whole, 4, tmp_path / "same")
    code, _, err = run("resume", same, "--data.share_prefix", "on")  # what auto had chosen
    assert code == 0, err
    assert weights(same) == weights(whole)


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("gpt2", ["--model.config.attn_pdrop", 0.1], "attn_pdrop"),
        ("qwen3", ["--lora.kind", "lora", "--lora.dropout", 0.1], "lora.dropout"),
    ],
)
def test_dropout_turns_it_off(
    run: Run, tokenizer: Any, long_chats: Path, tmp_path: Path, name: str, flags: list[Any], reason: str
) -> None:
    model = save_folder(tmp_path / "model", tiny_config(name), tokenizer)
    train(run, model, long_chats, tmp_path / "run", *FLAGS, "--train.max_steps", 1, *flags, "--data.share_prefix", "on")
    assert not shares(tmp_path / "run")["is_on"]
    assert reason in shares(tmp_path / "run")["reason"]


def test_compiled_blocks_are_for_separate_samples_and_experts_are_not_compiled(
    run: Run, tokenizer: Any, long_chats: Path, tmp_path: Path
) -> None:
    """A resumed run would be compiled for the sizes of other batches, and rounded in another way."""
    model = save_folder(tmp_path / "model", tiny_config("qwen3_moe"), tokenizer)
    out = train(run, model, long_chats, tmp_path / "run", *FLAGS, "--train.max_steps", 1, "--train.compile", "true")
    assert "train.compile is left out" in out
    assert "train.compile" in shares(tmp_path / "run")["reason"]


def test_a_model_whose_trees_are_not_exact_does_without(
    run: Run, model_folder: Path, long_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_tree import leaking

    monkeypatch.setattr("tunesmith.model.attention.attend_trees", leaking)
    out = train(run, model_folder, long_chats, tmp_path / "run", *FLAGS, "--train.max_steps", 1)
    assert "not shared: prefix trees and single samples differ by" in out
    assert not shares(tmp_path / "run")["is_on"]


@pytest.mark.parametrize("more", [(), ("--data.share_prefix", "on")], ids=["auto", "what auto had chosen"])
def test_a_resumed_run_does_not_go_on_with_trees_that_are_not_exact(
    run: Run, fails: Callable[..., TunesmithError], model_folder: Path, long_chats: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...],
) -> None:  # fmt: skip
    from test_tree import leaking

    flags = (*FLAGS, "--train.max_steps", 2, "--optim.schedule", "constant")
    train(run, model_folder, long_chats, tmp_path / "run", *flags)
    monkeypatch.setattr("tunesmith.model.attention.attend_trees", leaking)
    error = fails("resume", tmp_path / "run", "--train.max_steps", 4, *more)
    assert error.code == "prefixes-not-shared"


def test_a_stream_cannot_share(fails: Callable[..., TunesmithError], model_folder: Path, long_chats: Path) -> None:
    words = ["--data.stream", "true", "--train.max_steps", 1, "--output", "x"]
    with raises(ConfigError, "config", "data.share_prefix", "data.stream"):
        raise fails("train", "--model", model_folder, "--data", long_chats, *words, "--data.share_prefix", "on")


def test_all_tokens_of_a_row_are_trained_once(run: Run, model_folder: Path, long_chats: Path, tmp_path: Path) -> None:
    """Of an unrolled row the history is in each of its samples."""
    flags = (*FLAGS, "--data.train_on", "all", "--train.epochs", 1, "--train.log_steps", 1)
    train(run, model_folder, long_chats, tmp_path / "on", *flags)
    train(run, model_folder, long_chats, tmp_path / "off", *flags, "--data.share_prefix", "off")
    on, off = (records(tmp_path / name)[-1] for name in ("on", "off"))
    assert on["supervised_tokens"] < off["supervised_tokens"] / 1.5
    assert on["supervised_tokens"] < on["tokens"]


def test_two_processes_make_the_steps_of_one(run: Run, model_folder: Path, long_chats: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--train.max_steps", 6, "--train.log_steps", 1, "--train.grad_accum_steps", 3)
    train(run, model_folder, long_chats, tmp_path / "one", *flags)
    ended = torchrun(
        2,
        "-m",
        "tunesmith",
        "train",
        "--model",
        model_folder,
        "--data",
        long_chats,
        "--output",
        tmp_path / "two",
        *flags,
    )
    assert ended.code == 0, ended.err
    assert shares(tmp_path / "two")["is_on"]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 6
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    tokens = [json.loads(line)["tokens"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert tokens == [record["tokens"] for record in records(tmp_path / "one")]
