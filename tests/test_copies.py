"""Copies of the weights in bf16 over fp32 weights: gradients, embeddings, resume, and several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import ARCHITECTURES, build_model, killed_after, set_up_attention, tiny_config
from test_pack import make_store
from tunesmith.data.feed import Batches
from tunesmith.layers.copies import HalfCopies
from tunesmith.layers.speedup import speed_up
from tunesmith.model.head import choose_head_path
from tunesmith.model.loss import SupervisedLM
from tunesmith.runfolder import RunFolder
from tunesmith.training.checkpoint import newest_valid, write_manifest
from tunesmith.training.precision import Precision
from tunesmith.training.step import StepAborted, make_gradient

Run = Callable[..., tuple[int, str, str]]
FP64, FP32 = Precision("fp32", torch.float64, None), Precision("fp32", torch.float32, None)
AUTOCAST = Precision("bf16", torch.float32, torch.bfloat16)
COPIES = Precision("bf16", torch.float32, torch.bfloat16, has_copies=True)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
LENGTHS = [9, 3, 21, 14, 2, 17, 6, 30]
FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.precision", "bf16")


def build_lm(name: str, precision: Precision, **overrides: Any) -> SupervisedLM:
    """The same weights in every precision, of a spread at which rounding to bf16 shows."""
    model = build_model(tiny_config(name, initializer_range=0.1, **overrides)).to(precision.weights)
    is_packed = set_up_attention(model, 64, 256).is_isolated
    lm = SupervisedLM(model, is_packed, choose_head_path(model, is_packed))
    speed_up(model, model.get_output_embeddings(), is_checkpointed=False)
    if precision.copies:
        lm.copies = HalfCopies(model, precision.copies)
    return lm


def gradient(lm: SupervisedLM, batches: Batches, precision: Precision) -> tuple[float, dict[str, torch.Tensor]]:
    lm.zero_grad(set_to_none=True)
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.0)
    made = make_gradient(lm, optimizer, batches, 0.0, precision, NO_SCALER)
    named = lm.model.named_parameters()
    return made.read().loss, {name: p.grad.double().clone() for name, p in named if p.grad is not None}


def batches_of(tmp_path: Path) -> Batches:
    return Batches(make_store(tmp_path, LENGTHS), [np.arange(0, 4), np.arange(4, 8)])


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    off = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return (off / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_is_as_exact_as_with_autocast(name: str, tmp_path: Path) -> None:
    batches = batches_of(tmp_path)
    extra = {"router_aux_loss_coef": 0.0} if "moe" in name else {}
    exact_loss, exact = gradient(build_lm(name, FP64, **extra), batches, FP64)
    usual_loss, usual = gradient(build_lm(name, AUTOCAST, **extra), batches, AUTOCAST)
    lm = build_lm(name, COPIES, **extra)
    loss, found = gradient(lm, batches, COPIES)
    assert 0 < distance(found, exact) < 2.5 * distance(usual, exact) + 1e-3  # a residual stream in bf16 as well
    assert abs(loss - exact_loss) < 4 * abs(usual_loss - exact_loss) + 5e-3
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in lm.parameters() if p.grad is not None} == {torch.float32}


def test_gradients_of_forwards_add_up_in_fp32() -> None:
    """A gradient of 1, and 512 that bf16 would lose beside it."""
    layer = nn.Linear(1, 1, bias=False)
    with HalfCopies(layer, torch.bfloat16):
        for size in [1.0, *[2.0**-9] * 512]:
            layer(torch.full((1, 1), size, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.item() == 2.0


def test_an_embedding_of_a_frequent_token_keeps_its_small_gradients() -> None:
    """4,096 equal gradients: summed in bf16, they would end at 256."""
    embedding = nn.Embedding(4, 3)
    with HalfCopies(embedding, torch.bfloat16):
        output = embedding(torch.zeros(4096, dtype=torch.long))
        assert output.dtype == torch.bfloat16
        output.sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[0].tolist() == [4096.0] * 3
    assert embedding(torch.zeros(1, dtype=torch.long)).dtype == torch.float32


def test_tied_weights_have_one_gradient_and_stay_tied(tmp_path: Path) -> None:
    lm = build_lm("qwen3", COPIES, tie_word_embeddings=True)
    head, embedding = lm.model.get_output_embeddings(), lm.model.get_input_embeddings()
    _, found = gradient(lm, batches_of(tmp_path), COPIES)
    exact = build_lm("qwen3", FP64, tie_word_embeddings=True)
    _, wanted = gradient(exact, batches_of(tmp_path / "again"), FP64)
    assert head.weight is embedding.weight
    assert distance(found, wanted) < 0.05


def test_frozen_weights_get_no_gradient(tmp_path: Path) -> None:
    lm = build_lm("llama", FP32)
    lm.model.model.layers[0].requires_grad_(False)
    lm.copies = HalfCopies(lm.model, torch.bfloat16)
    _, found = gradient(lm, batches_of(tmp_path), COPIES)
    assert found.keys() == {name for name, p in lm.model.named_parameters() if p.requires_grad}


def test_weights_are_back_in_place_after_a_step_that_was_given_up(tmp_path: Path) -> None:
    lm = build_lm("llama", COPIES)
    before = dict(lm.model.named_parameters())
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.0)
    with pytest.raises(StepAborted):
        make_gradient(lm, optimizer, batches_of(tmp_path), 0.0, COPIES, NO_SCALER, gives_up=lambda: True)
    after = dict(lm.model.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_a_weight_that_its_class_keeps_in_fp32_has_no_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model._keep_in_fp32_modules_strict = ["1.weight"]
    with HalfCopies(model, torch.bfloat16):
        assert {name: p.dtype for name, p in model.named_parameters()} == {
            "0.weight": torch.bfloat16, "0.bias": torch.bfloat16, "1.weight": torch.float32, "1.bias": torch.bfloat16,
        }  # fmt: skip


@pytest.fixture
def straight(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> Path:
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "straight", *FAST,
                       "--train.max_steps", 6, "--train.save_steps", 2, "--train.keep_checkpoints", 9)  # fmt: skip
    assert code == 0, err
    return tmp_path / "straight"


def test_a_run_resumes_to_the_same_weights(run: Run, straight: Path, tmp_path: Path) -> None:
    killed = killed_after(straight, 2, tmp_path / "killed")
    code, _, err = run("resume", killed)
    assert code == 0, err
    assert (killed / "model/model.safetensors").read_bytes() == (straight / "model/model.safetensors").read_bytes()
    guard = json.loads((straight / "run.json").read_text())["guard"]
    assert guard["has_copies"] is True


def test_a_run_of_an_earlier_version_goes_on_with_autocast(run: Run, straight: Path, tmp_path: Path) -> None:
    killed = killed_after(straight, 2, tmp_path / "killed")
    newest, _ = newest_valid(RunFolder(killed))
    assert newest
    write_manifest(newest.folder, newest.step, {k: v for k, v in newest.guard.items() if k != "has_copies"})
    code, _, err = run("resume", killed)
    assert code == 0, err
    ours, old = (load_file(folder / "model/model.safetensors") for folder in (straight, killed))
    assert any(not torch.equal(ours[name], old[name]) for name in ours)
    assert json.loads((killed / "run.json").read_text())["guard"].get("has_copies", False) is False
