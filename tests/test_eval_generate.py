"""train.eval_generate: replies to held-out rows during training, which leave the training as it was, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import chat_row, killed_after, raises, save_folder, tiny_config, write_jsonl
from tunesmith.cli import main
from tunesmith.config.schema import ModelSection
from tunesmith.errors import ConfigError
from tunesmith.generation.replies import reply_to
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import load_speaker
from tunesmith.report.records import read_run
from tunesmith.rows.conversation import Message
from tunesmith.runfolder import RunFolder, read_metrics

Runs = Callable[..., tuple[int, str, str]]
WORDS = (
    "--data.chat_template", "chatml", "--data.eval_split", "0.1", "--train.max_steps", "4", "--train.eval_steps", "2",
    "--train.save_steps", "2", "--train.keep_checkpoints", "5", "--data.max_seq_len", "128",
)  # fmt: skip


def train(model: Path, data: Path, output: Path, *words: object) -> Path:
    given = ["--model", model, "--data", data, "--output", output, *WORDS, *words]
    assert main(["train", *map(str, given)]) == 0
    return output


def assert_equal_weights(one: Path, two: Path) -> None:
    first, second = (
        load_file(next(iter([*run.glob("model/model.safetensors"), *run.glob("adapter/adapter_model.safetensors")])))
        for run in (one, two)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def replies_of(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(run_folder).eval_replies.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a model that has dropout, data, and a run without and with replies."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny_config("qwen3", initializer_range=0.02, attention_dropout=0.3)
    model = save_folder(folder / "model", config, tokenizer)
    rows = [chat_row(f"<script>alert({i})</script>", "<b>The answer</b>") for i in range(30)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    train(model, data, folder / "without")
    train(model, data, folder / "with", "--train.eval_generate", 2)
    return folder


def test_weights_and_losses_are_the_same_with_and_without(made: Path) -> None:
    without, with_replies = made / "without", made / "with"
    assert_equal_weights(without, with_replies)
    assert not RunFolder(without).eval_replies.exists()
    before, after = (
        [record for record in read_metrics(RunFolder(run).metrics) if "eval_loss" in record]
        for run in (without, with_replies)
    )
    assert [record["eval_loss"] for record in before] == [record["eval_loss"] for record in after]
    assert [record["step"] for record in after] == [0, 2, 4]
    assert all(0 <= record[f"eval_{name}"] <= 1 for record in after for name in ("exact_match", "rougeL", "stopped"))
    rows = [[reply["row"] for reply in at["replies"]] for at in replies_of(with_replies)]
    assert rows == [rows[0]] * 3
    assert len(set(rows[0])) == 2


KINDS = {
    "lora": ("llama", {}, ("--lora.kind", "lora", "--lora.dropout", 0.3)),
    "moe": ("qwen3_moe", {"attention_dropout": 0.3}, ()),
    "one document a forward": ("gpt2", {"resid_pdrop": 0.2}, ("--train.gradient_checkpointing", "true")),
    "windows": ("gemma2", {}, ("--train.precision", "bf16")),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                               "max_position_embeddings": 32}, ("--lora.kind", "lora")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS if os.environ.get("TUNESMITH_LONG") else ["lora"])
def test_weights_are_the_same_for_every_kind(kind: str, chats: Path, tokenizer: Any, tmp_path: Path) -> None:
    name, overrides, words = KINDS[kind]
    model = save_folder(tmp_path / "model", tiny_config(name, initializer_range=0.02, **overrides), tokenizer)
    train(model, chats, tmp_path / "without", *words)
    train(model, chats, tmp_path / "with", "--train.eval_generate", 2, *words)
    assert_equal_weights(tmp_path / "without", tmp_path / "with")
    assert len(replies_of(tmp_path / "with")) == 3


def test_a_killed_run_gives_the_same_weights_and_replies(made: Path, tmp_path: Path) -> None:
    killed = killed_after(made / "with", 2, tmp_path / "killed")
    assert [at["step"] for at in replies_of(killed)] == [0, 2, 4]
    assert main(["resume", str(killed)]) == 0
    assert_equal_weights(made / "with", killed)
    assert replies_of(killed) == replies_of(made / "with")


def test_resume_may_change_it_and_a_run_from_before_it_resumes(made: Path, tmp_path: Path) -> None:
    killed = killed_after(made / "without", 2, tmp_path / "killed")
    config = killed / "config.yaml"
    lines = config.read_text().splitlines()
    kept = [line for line in lines if "eval_generate" not in line]
    assert len(kept) + 1 == len(lines)
    config.write_text("\n".join(kept) + "\n")
    assert main(["resume", str(killed), "--train.eval_generate", "1"]) == 0
    assert_equal_weights(made / "without", killed)
    assert [at["step"] for at in replies_of(killed)] == [4]


def test_replies_are_those_of_the_saved_model(made: Path) -> None:
    speaker = load_speaker(ModelSection(path=str(made / "with")))
    for answer in replies_of(made / "with")[-1]["replies"]:
        ids = speaker.encoder.encode_prompt(
            [Message("user", answer["prompt"].split("<|im_end|>")[0].split("user\n")[1])]
        )
        (reply,) = reply_to(speaker, [ids], Sampling(128, temperature=0))
        assert (reply.text, reply.has_stopped) == (answer["reply"], answer["stopped"])
        assert answer["reference"] == "<b>The answer</b>"


def test_the_report_shows_the_replies_over_the_steps(made: Path, tmp_path: Path) -> None:
    trained = shutil.copytree(made / "with", tmp_path / "run")
    with RunFolder(trained).eval_replies.open("a") as file:
        file.write('{"step": 7, "replies": [{"row": 1}]}\n{"step": 8, "rep')
    assert len(read_run(trained).series("eval_exact_match")[0]) == 3
    assert main(["report", str(trained)]) == 0
    page = RunFolder(trained).report.read_text()
    assert "Held-out rows during training" in page
    assert page.count("<b>step ") == 6
    assert "<script>alert(" not in page
    assert "&lt;b&gt;The answer" in page


def test_no_held_out_rows_is_an_error_and_raw_text_is_told(
    run: Runs, fails: Callable[..., Any], chats: Path, model_folder: Path, tmp_path: Path
) -> None:
    words = ("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run")
    with raises(ConfigError, "config", "train.eval_generate"):
        raise fails(*words, "--train.eval_generate", 2)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    trained = tmp_path / "text"
    code, out, errors = run(
        "train", "--model", model_folder, "--data", text, "--output", trained, "--data.eval_split", 0.3,
        "--train.max_steps", 1, "--train.eval_generate", 2, "--data.max_seq_len", 64,
    )  # fmt: skip
    assert code == 0, errors
    assert "none of the held-out rows can be answered" in out
    assert "eval_exact_match" not in read_metrics(RunFolder(trained).metrics)[-1]


def test_a_diverged_model_loses_the_scores_not_the_run(run: Runs, made: Path, tmp_path: Path) -> None:
    trained = tmp_path / "run"
    words = ("--train.eval_generate", 2, "--optim.lr", 1e38, "--optim.max_grad_norm", 0, "--train.on_nonfinite", "skip")
    given = ("--model", made / "model", "--data", made / "rows.jsonl", "--output", trained, *WORDS, *words)
    code, out, errors = run("train", *given)
    assert "could not be answered: the model's logits are inf or nan" in out
    assert code == 4, errors  # because of the weights, which are not saved
    assert [at["step"] for at in replies_of(trained)] == [0]
    at_end = read_metrics(RunFolder(trained).metrics)[-1]
    assert "eval_loss" in at_end
    assert "eval_exact_match" not in at_end
