"""Adapters: trained by the same code as all weights; the result opens in plain peft and gives the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import build_model, killed_after, save_folder, tiny_config
from tunesmith.adapters.adapter import choose_targets, find_problem
from tunesmith.config.schema import LoraSection, ModelSection
from tunesmith.errors import ConfigError, TunesmithError

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]
FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--lora.rank", 4, "--optim.lr", 1e-2)
BUSY = (
    *FAST,
    "--train.grad_accum_steps",
    2,
    "--train.max_steps",
    8,
    "--train.save_steps",
    2,
    "--train.keep_checkpoints",
    20,
)
KINDS: dict[str, tuple[Any, ...]] = {
    "lora": (),
    "dropout": ("--lora.kind", "lora", "--lora.dropout", 0.2),
    "rslora": ("--lora.kind", "rslora"),
    "dora": ("--lora.kind", "dora"),
    "pissa": ("--lora.kind", "pissa"),
    "olora": ("--lora.kind", "olora"),
    "lora+": ("--lora.kind", "lora", "--lora.lr_ratio", 16),
    "whole modules": ("--lora.kind", "lora", "--lora.modules_to_save", "lm_head", "embed_tokens"),
    "biases": ("--lora.kind", "lora", "--lora.bias", "all"),
    "regex": ("--lora.kind", "lora", "--lora.target_modules", r".*self_attn\.[qv]_proj"),
    "names": ("--lora.kind", "lora", "--lora.target_modules", "q_proj", "v_proj"),
    "8-bit optimizer": ("--lora.kind", "lora", "--optim.name", "adamw_8bit", "--lora.modules_to_save", "embed_tokens"),
    "nf4": ("--lora.kind", "lora", "--lora.quantize", "nf4"),
    "int8": ("--lora.kind", "lora", "--lora.quantize", "int8"),
}  # fmt: skip


def base_of(folder: Path, tokenizer: Any, name: str = "qwen2", **overrides: Any) -> Path:
    """qwen2 has biases; the weights are large enough to make errors visible."""
    return save_folder(folder, tiny_config(name, initializer_range=0.1, **{"eos_token_id": 0} | overrides), tokenizer)


def train_words(base: Path, chats: Path, output: Path, kind: str) -> tuple[Any, ...]:
    flags = KINDS[kind] if kind != "lora" else ("--lora.kind", "lora")
    return ("train", "--model", base, "--data", chats, "--output", output, *BUSY, *flags)


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0]


def adapter_bytes(run_folder: Path) -> bytes:
    return (run_folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_resumes_exactly_and_opens_in_peft(
    run: Run, tokenizer: Any, chats: Path, tmp_path: Path, kind: str
) -> None:
    if kind in ("nf4", "int8", "8-bit optimizer"):
        pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes works on blocks of 64
    base, output = base_of(tmp_path / "base", tokenizer, **(wide if kind == "nf4" else {})), tmp_path / "run"
    code, out, err = run(*train_words(base, chats, output, kind))
    assert code == 0, err
    assert "trained (" in out
    assert "adapter saved: " in out
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"]
    # a checkpoint contains the trained weights, not the base
    checkpoint = output / "checkpoints" / "step-000004"
    assert not (checkpoint / "model.safetensors").exists()
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 200_000
    # killed after step 4
    part = killed_after(output, 4, tmp_path / "part")
    code, _, err = run("resume", part)
    assert code == 0, err
    assert adapter_bytes(part) == adapter_bytes(output)
    # plain peft, on the unchanged base
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "adapter")
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert (logits_of(theirs) - plain).abs().max() > 0.01  # it has learned something
    AutoTokenizer.from_pretrained(output / "adapter")
    if kind not in ("nf4", "int8"):  # they were trained on a quantized base
        from tunesmith.generation.speaker import load_speaker

        ours = load_speaker(ModelSection(path=str(output))).model
        assert torch.allclose(logits_of(ours), logits_of(theirs), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "qwen3_moe"])
def test_all_linear_means_every_linear_layer_but_head_and_router(name: str) -> None:
    model = build_model(tiny_config(name))
    targets, parameters = choose_targets(model, LoraSection(kind="lora"))
    wanted = {
        "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "gpt2": ["c_attn", "c_fc", "c_proj"],
        "qwen3_moe": ["k_proj", "o_proj", "q_proj", "v_proj"],
    }
    assert targets == wanted.get(name, wanted["llama"])
    assert parameters == (["mlp.experts.down_proj", "mlp.experts.gate_up_proj"] if name == "qwen3_moe" else [])


ODD = {
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 4,
        "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4, "head_dim": 8,
    },
    "deepseek_v4": {"n_routed_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_architectures_with_layers_of_their_own_kind(
    run: Run, tokenizer: Any, chats: Path, tmp_path: Path, name: str
) -> None:
    """Gemma 3n has a list of sizes; DeepSeek V4's first layers have a grouped matrix and no router."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(name, **sizes | {"vocab_size": 400, "max_position_embeddings": 512} | ODD[name])
    base = save_folder(tmp_path / "base", config, tokenizer)
    code, _, err = run(*train_words(base, chats, tmp_path / "run", "lora"), "--train.max_steps", 1)
    assert code == 0, err


class Grouped(torch.nn.Linear):
    """A layer of several small matrices for several parts of its input, as DeepSeek V4's o_a_proj."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...gi,goi->...go", input, self.weight.unflatten(0, (input.shape[-2], -1)))


class Plain(torch.nn.Linear):
    """Falcon writes its linear layers out."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T


def test_all_linear_leaves_out_layers_that_peft_cannot_adapt(tokenizer: Any) -> None:
    model = build_model(tiny_config("llama"))
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj, attention.k_proj = (kind(16, 32, bias=False) for kind in (Plain, Grouped))
    targets, _ = choose_targets(model, LoraSection(kind="lora"))
    assert "q_proj" in targets
    assert "k_proj" not in targets
    assert "k_proj" in find_problem(model, LoraSection(kind="lora"), ["k_proj"], [])


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe"])
def test_other_architectures(run: Run, tokenizer: Any, chats: Path, tmp_path: Path, name: str) -> None:
    base, output = base_of(tmp_path / "base", tokenizer, name), tmp_path / "run"
    code, out, err = run(*train_words(base, chats, output, "lora"))
    assert code == 0, err
    assert "packed: packed and solo differ" in out
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "adapter")
    from tunesmith.generation.speaker import load_speaker

    ours = load_speaker(ModelSection(path=str(output))).model
    assert torch.allclose(logits_of(ours), logits_of(theirs), atol=1e-5)


def test_the_default_learning_rate_of_adapters(run: Run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    import yaml

    base = base_of(tmp_path / "base", tokenizer)
    words = ("train", "--model", base, "--data", chats, "--data.max_seq_len", 64, "--train.max_steps", 1)
    assert run(*words, "--output", tmp_path / "a", "--lora.kind", "lora")[0] == 0
    assert run(*words, "--output", tmp_path / "b")[0] == 0
    rates = [yaml.safe_load((tmp_path / name / "config.yaml").read_text())["optim"]["lr"] for name in "ab"]
    assert rates == [2e-4, 2e-5]


def test_lora_plus_raises_the_rate_of_b_alone() -> None:
    from tunesmith.adapters.adapter import add_adapter
    from tunesmith.config.schema import OptimSection
    from tunesmith.training.optim import build_optimizer, set_lr

    model = build_model(tiny_config("llama"))
    add_adapter(model, LoraSection(kind="lora"), "base")
    optimizer = build_optimizer(model, OptimSection(), 16.0)
    set_lr(optimizer, 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)].split(".")[-3]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {"lora_A": 1e-3, "lora_B": 16e-3}


BAD: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {  # flags -> what the message names
    "rank 0": (("--lora.rank", 0), ("lora.rank: ",)),
    "no such target": (("--lora.target_modules", "query"), ("target_modules 'query'", "down_proj")),
    "no such regex": (("--lora.target_modules", ".*query$"), ("target_modules '.*query$'", "down_proj")),
    "no such module": (("--lora.modules_to_save", "head"), ("modules_to_save 'head'",)),
    "no such parameter": (("--lora.target_parameters", "mlp.experts.w1"), ("target_parameters 'mlp.experts.w1'",)),
    "pissa with more": (("--lora.kind", "pissa", "--lora.modules_to_save", "lm_head"), ("kind: pissa", "modules_to_save")),
    "pissa in 4 bits": (("--lora.kind", "pissa", "--lora.quantize", "nf4"), ("lora.quantize: pissa",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(fails: Fails, tokenizer: Any, chats: Path, tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path / "base", tokenizer)
    flags, facts = BAD[name]
    kind = () if "--lora.kind" in flags else ("--lora.kind", "lora")
    error = fails("train", "--model", base, "--data", chats, "--output", tmp_path / "run", *kind, *flags)
    assert (type(error), error.exit_code) == (ConfigError, 1)
    assert all(fact in str(error) for fact in facts), error
    assert not (tmp_path / "run").exists()


def test_settings_without_a_kind_are_refused(fails: Fails, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tokenizer)
    error = fails("train", "--model", base, "--data", chats, "--output", tmp_path / "run", "--lora.rank", 8)
    assert (type(error), error.exit_code, "lora.rank: lora.kind" in str(error)) == (ConfigError, 1, True)


@pytest.mark.usefixtures("full_replies")
def test_the_report_has_replies_of_the_adapter(run: Run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tokenizer)
    assert run(*train_words(base, chats, tmp_path / "run", "lora"), "--data.eval_split", 0.1)[0] == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "greedy replies to held-out rows" in page


def test_no_adapter_on_an_adapter(run: Run, fails: Fails, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tokenizer)
    assert run(*train_words(base, chats, tmp_path / "one", "lora"))[0] == 0
    error = fails(*train_words(tmp_path / "one", chats, tmp_path / "two", "lora"))
    assert (error.code, error.exit_code) == ("base-is-adapter", 1)
    assert f"tunesmith merge {tmp_path / 'one'} --output MERGED" in str(error)


def test_4_bit_layers_keep_their_gradient_after_an_evaluation(tokenizer: Any, tmp_path: Path) -> None:
    """bitsandbytes repacks weights for CPUs with AVX512-BF16 in the first evaluation, and its kernel has no gradient."""
    pytest.importorskip("bitsandbytes")
    from tunesmith.adapters.adapter import add_adapter, quantization_config
    from tunesmith.model.load import load_config, load_model

    base = base_of(tmp_path / "base", tokenizer, hidden_size=64, intermediate_size=128, head_dim=16)
    section, lora = ModelSection(path=str(base)), LoraSection(kind="lora", quantize="nf4")
    quantization = quantization_config(lora, torch.float32)
    model = load_model(section, load_config(section, tokenizer), torch.float32, 0, quantization)
    add_adapter(model, lora, "base")
    ids = torch.arange(5, 25)[None]
    gradients = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
    assert set(gradients[0]) == set(gradients[1])
    assert any("layers.0" in name and gradient.abs().max() > 0 for name, gradient in gradients[1].items())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
