"""Presets of new:PRESET models: transformers configs with random weights, which other tools can open.

Weights are initialized as in transformers: normal with std initializer_range (0.02), norms 1, biases 0, seeded with
train.seed.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tunesmith.errors import ModelError, RunError, TunesmithError
from tunesmith.files import is_out_of_memory
from tunesmith.model.source import telling_text

_MINIMIND_3: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 96,
    "intermediate_size": 2432,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
_MINIMIND: dict[str, Any] = {
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
# Parameter counts assume MiniMind's vocabulary of 6,400 tokens.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {  # about 1M
        "model_type": "qwen3",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "laptop": {  # about 3M: what recipe:laptop-pretrain trains on two CPU cores
        "model_type": "qwen3",
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "minimind-26m": {"model_type": "llama", **_MINIMIND, "hidden_size": 512, "intermediate_size": 1408},
    "minimind-64m": {"model_type": "qwen3", **_MINIMIND_3},
    "minimind-104m": {
        "model_type": "llama",
        **_MINIMIND,
        "hidden_size": 768,
        "num_hidden_layers": 16,
        "intermediate_size": 2048,
    },
    "minimind-moe": {
        "model_type": "qwen2_moe",
        **_MINIMIND,
        "hidden_size": 640,
        "intermediate_size": 1728,
        "moe_intermediate_size": 1728,
        "shared_expert_intermediate_size": 1728,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.1,
    },
    "minimind-3-moe": {
        "model_type": "qwen3_moe",
        **_MINIMIND_3,
        "moe_intermediate_size": 2432,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 5e-4,
    },
}


_UNGATED = ("minimind-moe",)  # presets whose shared expert has no gate: a gate of zeros, which training keeps


@torch.no_grad()
def zero_gates(name: str, model: nn.Module) -> nn.Module:
    """Set the shared experts' gates of a new model to zero, where the preset has none; other weights are unchanged."""
    if name in _UNGATED:
        for parameter, weight in model.named_parameters():
            if ".shared_expert_gate." in parameter:
                weight.zero_()
    return model


def build_preset_config(name: str, overrides: dict[str, Any], tokenizer: Any) -> PretrainedConfig:
    """The config of new:NAME for this tokenizer.

    Args:
        overrides: model.config.*, any fields of the transformers config.

    Raises:
        ModelError: unknown preset or field, or no model can be built with these values.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean new:{close[0]}?" if close else ""
        raise ModelError(
            f"new:{name}: no such preset.{hint} Known: {', '.join(f'new:{p}' for p in PRESETS)}.", code="unknown-preset"
        )
    values = dict(PRESETS[name])
    if name == "minimind-moe" and overrides.get("num_experts_per_tok") == 1:
        values["norm_topk_prob"] = False  # as MiniMind before 2026-03-24; MiniMind 3 divides a single weight by itself
    model_type = values.pop("model_type")
    known = AutoConfig.for_model(model_type)
    for key in overrides:
        is_field = key in values or (hasattr(known, key) and not callable(getattr(known, key)))
        if key == "model_type":
            others = ", ".join(f"new:{other} ({preset['model_type']})" for other, preset in PRESETS.items())
            raise ModelError(
                f"model.config.model_type: new:{name} is of the type {model_type}; choose a preset by its type: "
                f"{others}.",
                code="unknown-preset-key",
            )
        if not is_field or key.startswith("_"):
            close = difflib.get_close_matches(key, list(known.to_dict()), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(
                f"model.config.{key}: the {model_type} config has no such field{hint}", code="unknown-preset-key"
            )
    num_ids = max(tokenizer.get_vocab().values()) + 1
    wanted = overrides.get("vocab_size")
    if isinstance(wanted, int) and wanted < num_ids:
        raise ModelError(
            f"model.config.vocab_size {wanted}: the tokenizer has ids up to {num_ids - 1}; the minimum is {num_ids}. "
            "Remove the key, or use a smaller tokenizer.",
            code="vocab-too-small",
        )
    special = {
        "vocab_size": num_ids,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = AutoConfig.for_model(model_type, **{**values, **special, **overrides})
        if overrides:
            _try_shapes(config)
    except Exception as error:  # the libraries below raise various classes
        raise explain_overrides(name, overrides, error) from None
    return config


def _try_shapes(config: PretrainedConfig) -> None:
    """Run two tokens through the model on the meta device: checks shapes without memory or arithmetic."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads < 1 or shared < 1 or heads % shared:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared})")
    with torch.device("meta"), torch.no_grad():
        # bf16: the experts' kernel supports only bf16 on this device
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
        model(torch.zeros(1, 2, dtype=torch.long))


def explain_overrides(name: str, overrides: dict[str, Any], error: Exception) -> TunesmithError:
    if is_out_of_memory(error):
        return RunError(
            f"new:{name} with these sizes does not fit into memory. Lower model.config.hidden_size or others.",
            code="out-of-memory",
        )
    given = ", ".join(f"model.config.{key} {value}" for key, value in overrides.items())
    return ModelError(
        f"{given or 'model.config'}: new:{name} cannot be built with these values: {telling_text(error)}.",
        code="preset-not-buildable",
    )
