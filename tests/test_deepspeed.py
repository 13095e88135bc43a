"""Runs under DeepSpeed, two processes on gloo; they need DeepSpeed, and most take some ten seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import chat_row, save_folder, tiny_config, write_jsonl

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.slow,
]
is_long = pytest.mark.skipif("TUNESMITH_LONG" not in os.environ, reason="long; set TUNESMITH_LONG=1")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "says", "hello", "to", "you"]


def launch(size: int, *words: object, code: int = 0) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size else []
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tunesmith", *map(str, words)],
        capture_output=True, text=True, timeout=240, env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    save_folder(folder / "model", tiny_config("qwen3", initializer_range=0.02, tie_word_embeddings=True), tokenizer)
    rows = [chat_row(" ".join(WORDS[: 3 + n % 9]), " ".join(WORDS[n % 7 :])) for n in range(120)]
    write_jsonl(folder / "chats.jsonl", rows)
    for stage in (1, 2, 3):
        (folder / f"z{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return folder


def words(place: Path, name: str, *more: object) -> list[object]:
    return [
        "train", "--model", place / "model", "--data", place / "chats.jsonl", "--output", place / name,
        "--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.grad_accum_steps", 3,
        "--optim.lr", 1e-3, "--train.save_steps", 4, "--train.keep_checkpoints", 9, *more,
    ]  # fmt: skip


def losses(place: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def cut_back(place: Path, name: str, copy: str, step: int) -> Path:
    """A copy of a run as it was after its checkpoint of `step`."""
    shutil.copytree(place / name, place / copy)
    for folder in (place / copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    for saved in ("model", "adapter"):
        shutil.rmtree(place / copy / saved, ignore_errors=True)
    return place / copy


def weights(place: Path, name: str) -> dict[str, torch.Tensor]:
    [file] = [
        *(place / name).glob("model/model.safetensors"),
        *(place / name).glob("adapter/adapter_model.safetensors"),
    ]
    return load_file(file)


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], limit: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape
        assert (one[name] - other[name]).abs().max() <= limit, name


LORA = ("--lora.kind", "lora", "--lora.rank", 4)


@is_long
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_fifty_steps_equal_one_process(place: Path, kind: str) -> None:
    more = ("--train.max_steps", 50, *(LORA if kind == "lora" else ()))
    launch(0, *words(place, f"one-{kind}", *more))
    for stage in (1, 2, 3):
        name = f"fifty-{kind}-{stage}"
        launch(2, *words(place, name, *more, "--train.deepspeed", place / f"z{stage}.json"))
        ours, theirs = losses(place, f"one-{kind}"), losses(place, name)
        assert len(ours) == len(theirs) == 50
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
        assert_near(weights(place, f"one-{kind}"), weights(place, name), 1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_bit_equal_and_by_other_means(place: Path, stage: int) -> None:
    """With evaluation, replies and checkpointing, under another stage, and without DeepSpeed; nothing foreign is
    printed and no file of DeepSpeed is written."""
    more = ("--train.max_steps", 8, "--data.eval_split", 0.1, "--train.eval_steps", 4, "--train.eval_generate", 1)
    name = f"all-{stage}"
    shown = launch(
        2, *words(place, name, *more, "--train.gradient_checkpointing", True, "--train.deepspeed",
                  place / f"z{stage}.json")
    )  # fmt: skip
    assert "DeepSpeed" not in shown
    assert "[INFO]" not in shown  # of its log
    assert "[WARNING]" not in shown
    assert "Warning" not in shown
    assert not [path for path in (place / name).rglob("*") if path.suffix in (".pt", ".pth")]
    whole = weights(place, name)
    launch(2, "resume", cut_back(place, name, f"{name}-same", 4))
    assert_near(whole, weights(place, f"{name}-same"), 0.0)
    if "TUNESMITH_LONG" in os.environ:
        for size, parallel in ((0, "none"), (2, "ddp"), (2, "fsdp"), (3, "deepspeed")):
            copy = cut_back(place, name, f"{name}-{parallel}", 4)
            launch(size, "resume", copy, "--train.parallel", parallel)
            assert_near(whole, weights(place, copy.name), 2e-5)
            assert max(abs(a - b) for a, b in zip(losses(place, name), losses(place, copy.name), strict=True)) < 1e-5


@is_long
def test_a_run_of_one_process_is_resumed_under_deepspeed(place: Path) -> None:
    for kind, more in (("full", ()), ("lora", LORA)):
        launch(0, *words(place, f"begun-{kind}", "--train.max_steps", 8, *more))
        for stage in (1, 2, 3):
            copy = cut_back(place, f"begun-{kind}", f"begun-{kind}-{stage}", 4)
            launch(2, "resume", copy, "--train.parallel", "deepspeed", "--train.deepspeed", place / f"z{stage}.json")
            assert_near(weights(place, f"begun-{kind}"), weights(place, copy.name), 2e-5)


@is_long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_is_skipped(place: Path, tokenizer: Any, stage: int) -> None:
    """The embedding of one token gives non-finite gradients; its steps are left out, and weights stay as they were."""
    from safetensors.torch import save_file

    folder = place / f"poisoned-{stage}"
    save_folder(folder, tiny_config("qwen3", initializer_range=0.02, tie_word_embeddings=False), tokenizer)
    tensors = load_file(folder / "model.safetensors")
    [token] = tokenizer("~")["input_ids"]
    tensors["model.embed_tokens.weight"][token] = 3e38  # its square is infinite
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [chat_row(f"What is the answer {'~' if i == 7 else i}?", f"The answer is {i} and you.") for i in range(20)]
    data = write_jsonl(place / f"rows-{stage}.jsonl", rows)
    given = ("--model", folder, "--data", data, "--train.epochs", 2, "--train.grad_accum_steps", 2)
    zero = ("--train.deepspeed", place / f"z{stage}.json")
    skip = ("--train.on_nonfinite", "skip")
    launch(0, *words(place, f"skip-none-{stage}", *given, *skip))
    launch(2, *words(place, f"skip-zero-{stage}", *given, *skip, *zero))
    for name in (f"skip-none-{stage}", f"skip-zero-{stage}"):
        records = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
        assert [record["skipped"] for record in records if "skipped" in record] == [1, 2]
    assert losses(place, f"skip-none-{stage}") == pytest.approx(losses(place, f"skip-zero-{stage}"), abs=1e-5)
    assert_near(weights(place, f"skip-none-{stage}"), weights(place, f"skip-zero-{stage}"), 2e-5)
    shown = launch(2, *words(place, f"stop-{stage}", *given, *zero), code=-1)
    assert f"{data}:8" in shown


def test_one_process_under_a_launcher(place: Path) -> None:
    launch(1, *words(place, "alone", "--train.max_steps", 2, "--train.deepspeed", place / "z1.json"))
    assert len(losses(place, "alone")) == 2
