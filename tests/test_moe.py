"""Mixtures of experts: what holds for a dense model holds for them (resume, merge, precision, checkpointing, tokens)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import build_model, killed_after, save_folder, tiny_config
from test_adapters import logits_of
from test_loss import LENGTHS
from test_pack import make_store
from tunesmith.config.schema import LoraSection
from tunesmith.data.pack import build_batch
from tunesmith.errors import ModelError
from tunesmith.model.isolation import use_packed_attention
from tunesmith.model.loss import SupervisedLM, supervised_loss

FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.max_steps", 4, "--train.save_steps", 2,
        "--train.save_minutes", "null", "--train.keep_checkpoints", 9, "--optim.lr", 1e-2)  # fmt: skip
LORA = ("--lora.kind", "lora", "--lora.rank", 4)
MODEL, ADAPTER = "model/model.safetensors", "adapter/adapter_model.safetensors"


def base_of(folder: Path, tokenizer: Any, name: str, **overrides: Any) -> Path:
    return save_folder(folder, tiny_config(name, initializer_range=0.1, eos_token_id=0, **overrides), tokenizer)


def ungated(folder: Path, tokenizer: Any) -> Path:
    """MiniMind's mixture of before 2026-03 in Qwen2-MoE's form: the shared expert's gate is zero."""
    model = build_model(tiny_config("qwen2_moe", initializer_range=0.1, eos_token_id=0))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.shared_expert_gate.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gates_of(file: Path) -> list[torch.Tensor]:
    return [tensor for name, tensor in load_file(file).items() if "shared_expert_gate" in name]


def train_and_resume(run: Any, base: Path, chats: Path, folder: Path, *flags: Any) -> str:
    """Train, and resume from the middle to the same bytes; returns what was printed."""
    whole = folder / "whole"
    code, out, err = run("train", "--model", base, "--data", chats, "--output", whole, *FAST, *flags)
    assert code == 0, err
    part = killed_after(whole, 2, folder / "part")
    code, _, err = run("resume", part)
    assert code == 0, err
    saved = ADAPTER if "--lora.kind" in flags else MODEL
    for file in (saved, "checkpoints/step-000004/optimizer.safetensors"):
        assert (part / file).read_bytes() == (whole / file).read_bytes()
    return str(out)


WAYS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "bf16": ("qwen2_moe", ("--train.precision", "bf16")),
    "bf16 weights, layers": ("qwen3_moe", ("--train.precision", "bf16_pure", "--train.router_loss", "layers")),
    "checkpointing, evaluation": (
        "qwen2_moe",
        ("--train.gradient_checkpointing", "true", "--data.eval_split", 0.2, "--train.eval_steps", 1),
    ),
    "tokens, unrolled": ("qwen3_moe", ("--model.add_tokens", "<note>", "--data.history", "unroll")),
    "adapter, bf16, tokens": ("qwen3_moe", (*LORA, "--train.precision", "bf16", "--model.add_tokens", "<note>")),
    "adapter with the router": ("qwen2_moe", (*LORA, "--lora.modules_to_save", "mlp.gate")),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_resumed_and_merged_as_dense_models_are(
    run: Any, tokenizer: Any, chats: Path, tmp_path: Path, way: str
) -> None:
    name, flags = WAYS[way]
    base = base_of(tmp_path / "base", tokenizer, name)
    train_and_resume(run, base, chats, tmp_path, *flags)
    if "--lora.kind" not in flags:
        return
    code, _, err = run("merge", tmp_path / "whole", "--output", tmp_path / "merged")
    assert code == 0, err
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if "--model.add_tokens" in flags:
        plain.resize_token_embeddings(401, mean_resizing=False)
    wanted = logits_of(PeftModel.from_pretrained(plain, tmp_path / "whole" / "adapter"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("flags", [("--optim.weight_decay", 0.1), LORA], ids=["full", "adapter"])
def test_experts_that_no_token_chooses(
    run: Any, tokenizer: Any, chats: Path, tmp_path: Path, flags: tuple[Any, ...]
) -> None:
    """One of 32 experts a token: some get no token in a step, and some none at all."""
    base = base_of(tmp_path / "base", tokenizer, "qwen3_moe", num_experts=32, num_experts_per_tok=1)
    train_and_resume(run, base, chats, tmp_path, *flags, "--data.limit", 2)
    assert '"expert_load": [0.0, ' in (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_two_adapters_on_fused_experts(run: Any, fails: Any, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tokenizer, "qwen3_moe")
    two = [tmp_path / "one", tmp_path / "two"]
    for seed, output in enumerate(two):
        words = ("train", "--model", base, "--data", chats, *FAST, *LORA, "--train.seed", seed, "--train.max_steps", 2)
        assert run(*words, "--output", output)[0] == 0
    code, _, err = run("merge", *two, "--output", tmp_path / "merged")
    assert code == 0, err
    both = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for output in two:
        both = PeftModel.from_pretrained(both, output / "adapter").merge_and_unload()
    wanted = logits_of(both)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()
    error = fails("merge", *two, "--method", "linear", "--output", tmp_path / "other")
    assert (type(error), error.code, "--method sequential" in str(error)) == (ModelError, "not-combinable", True)


@pytest.mark.parametrize("kind", ["transformers", "layers", "sequences"])
def test_checkpointing_changes_no_gradient_of_a_router_loss(kind: Any, tmp_path: Path) -> None:
    store, grads = make_store(tmp_path, LENGTHS), []
    for checkpointing in (False, True):
        model = build_model(tiny_config("qwen2_moe", router_aux_loss_coef=0.5), torch.float64)
        use_packed_attention(model)
        lm = SupervisedLM(model, True, "decoder", router_loss=kind).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        sums = supervised_loss(lm, build_batch(store, range(8)))
        assert sums.router_loss is not None
        (sums.loss + sums.router_loss).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_a_gate_of_zeros_stays_zero(run: Any, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    """In a run, its checkpoints and optimizer, after a resume, and in a second stage."""
    base, whole = ungated(tmp_path / "base", tokenizer), tmp_path / "whole"
    out = train_and_resume(run, base, chats, tmp_path)
    assert "all trained but its shared experts' gates" in out
    assert "gates" in (whole / "model" / "README.md").read_text()
    code, _, err = run("train", "--model", whole, "--data", chats, "--output", tmp_path / "second", *FAST)
    assert code == 0, err
    files = [whole / MODEL, whole / "checkpoints" / "step-000002" / "model.safetensors", tmp_path / "part" / MODEL]
    for file in (*files, tmp_path / "second" / MODEL):
        assert len(gates_of(file)) == 2
        assert not any(gate.any() for gate in gates_of(file))
    assert not gates_of(whole / "checkpoints" / "step-000004" / "optimizer.safetensors")
    learned = load_file(whole / MODEL)["model.layers.0.mlp.shared_expert.down_proj.weight"]
    assert not torch.equal(
        learned, load_file(base / "model.safetensors")["model.layers.0.mlp.shared_expert.down_proj.weight"]
    )


def test_a_gate_that_is_not_zero_everywhere_is_trained(run: Any, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    model = build_model(tiny_config("qwen2_moe", initializer_range=0.1, eos_token_id=0))
    torch.nn.init.zeros_(model.model.layers[0].mlp.shared_expert_gate.weight)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    code, out, err = run("train", "--model", tmp_path / "base", "--data", chats, "--output", tmp_path / "run", *FAST)
    assert code == 0, err
    assert "all trained" in out
    assert "gates" not in out
    assert all(gate.any() for gate in gates_of(tmp_path / "run" / MODEL))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "shared_expert_gate"]},
        {"target_modules": [r".*(q_proj|expert_gate)"]},
        {"modules_to_save": ["shared_expert_gate"]},
        {"modules_to_save": ["mlp"]},
        {"target_parameters": ["shared_expert_gate.weight"]},
    ],
)
def test_an_adapter_leaves_a_gate_of_zeros_alone(targets: dict[str, Any]) -> None:
    from tunesmith.adapters.adapter import choose_targets, find_problem

    lora = LoraSection(kind="lora", **targets)
    model = build_model(tiny_config("qwen2_moe"))
    assert find_problem(model, lora, *choose_targets(model, lora)) == ""
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.shared_expert_gate.weight)
    assert "shared_expert_gate" in find_problem(model, lora, *choose_targets(model, lora))
