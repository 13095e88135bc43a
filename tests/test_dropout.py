"""Dropout of a loaded model is set for training, saved with it, and kept by a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import killed_after, save_folder, tiny_config
from tunesmith.errors import ConfigError, ModelError

SHORT = ("--train.max_steps", 4, "--train.save_steps", 2, "--train.save_minutes", "null", "--train.micro_batch_tokens", 256,
         "--data.max_seq_len", 128, "--optim.lr", 1e-3, "--train.keep_checkpoints", 9)  # fmt: skip


def test_dropout_changes_the_training_and_a_resume_keeps_its_bytes(
    run, tokenizer: Any, chats: Path, tmp_path: Path
) -> None:
    base = save_folder(tmp_path / "base", tiny_config("gpt2", initializer_range=0.02), tokenizer)
    words = ("train", "--model", base, "--data", chats, *SHORT)
    weights = {}
    for name, flags in {
        "none": (),
        "some": ("--model.config.resid_pdrop", 0.2, "--model.config.attn_pdrop", 0.1),
    }.items():
        code, _, err = run(*words, "--output", tmp_path / name, *flags)
        assert code == 0, err
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    assert any(not weights["none"][key].equal(weights["some"][key]) for key in weights["none"])
    saved = json.loads((tmp_path / "some" / "model" / "config.json").read_text())
    assert (saved["resid_pdrop"], saved["attn_pdrop"], saved["embd_pdrop"]) == (0.2, 0.1, 0.0)
    killed = killed_after(tmp_path / "some", 2, tmp_path / "part")
    code, _, err = run("resume", killed)
    assert code == 0, err
    assert (killed / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "some" / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("flag", "value", "kind", "code"),
    [
        ("resid_pdrop", 0.1, ModelError, "no-such-dropout"),  # this architecture has attention_dropout
        ("attention_dropout", 1, ConfigError, "config"),
        ("attention_dropout", "yes", ConfigError, "config"),
        ("hidden_size", 64, ConfigError, "config"),
    ],
)
def test_what_is_no_dropout_of_the_model(
    fails, model_folder: Path, chats: Path, tmp_path: Path, flag: str, value: Any, kind: Any, code: str
) -> None:
    error = fails(
        "train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run", f"--model.config.{flag}", value
    )
    assert (type(error), error.code) == (kind, code)
    assert flag in str(error)
    assert not (tmp_path / "run").exists()
