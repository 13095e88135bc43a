"""The config of a MiniMind file: what its tensors say, what MiniMind's config classes hold, what the user sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, ModelError
from tunesmith.minimind.names import Shape

# what a file does not say, by the names of transformers; model.config.* sets them
FREE_KEYS = (
    "num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps", "num_experts_per_tok", "norm_topk_prob",
    "max_position_embeddings", "router_aux_loss_coef", "attention_dropout",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """A config for transformers.

    Attributes:
        model_type: of transformers.
        values: fields of that config.
        assumed: names of fields that neither the file nor the user has given, with their values.
    """

    model_type: str
    values: dict[str, Any]
    assumed: dict[str, Any]


def default_settings(generation: str, hidden: int, ratio: int = 4) -> dict[str, Any]:
    """What MiniMind's config class of a generation holds unless told otherwise, by the names of transformers.

    Args:
        ratio: query heads to a key-value head; 2 in the 2024 form is the first release (16 and 8 heads, RoPE base 1e4).
    """
    if generation == "minimind-3":
        return {
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": hidden // 8, "rope_theta": 1e6,
            "intermediate_size": math.ceil(hidden * math.pi / 64) * 64, "rms_norm_eps": 1e-6, "num_experts": 4,
            "num_experts_per_tok": 1, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4,
        }  # fmt: skip
    is_first = generation == "2024" and ratio == 2
    return {
        "num_attention_heads": 16 if is_first else 8, "num_key_value_heads": 8 if is_first else 2,
        "head_dim": hidden // (16 if is_first else 8), "rope_theta": 1e4 if is_first else 1e6,
        "intermediate_size": math.ceil(int(8 * hidden / 3) / 64) * 64, "rms_norm_eps": 1e-5, "num_experts": 4,
        "num_experts_per_tok": 2, "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0 if is_first else 0.1,  # the first release computed the loss and did not add it
    }  # fmt: skip


def find_settings(path: Path, shape: Shape, given: Mapping[str, Any], is_tied: bool) -> Settings:
    """The config of a file.

    Args:
        given: model.config, fields that the user sets.
        is_tied: whether the head is the embedding.

    Raises:
        ConfigError: a given field cannot be set, or does not fit the tensors.
    """
    if unknown := [key for key in given if key not in FREE_KEYS]:
        why = f"cannot be set for a .pth, whose tensors decide it; can be set: {', '.join(FREE_KEYS)}"
        raise ConfigError(str(path), [f"model.config.{key}: {why}" for key in unknown])
    if shape.experts and not shape.shared and shape.generation != "minimind-3":
        raise ModelError(
            f"{path}: its mixture of experts has no shared expert; no architecture of transformers computes that form "
            "of MiniMind exactly. Train the dense model, or one with shared experts.",
            code="pth-not-convertible",
        )
    found = default_settings(shape.generation, shape.hidden, shape.q_size // shape.kv_size)
    free = {key: found[key] for key in FREE_KEYS if key in found}
    free |= {"max_position_embeddings": 32768, "attention_dropout": 0.0}
    if shape.generation == "minimind-3":
        sizes = {"num_attention_heads": shape.q_size, "num_key_value_heads": shape.kv_size}
        heads = {key: size // shape.head_dim for key, size in sizes.items()}
    else:
        free["num_key_value_heads"] = free["num_attention_heads"] * shape.kv_size // shape.q_size
        heads = {}
    given = {key: _as_number(value) for key, value in given.items()}
    told = {**_pair_heads(shape, given), **given, **heads}
    values = {**free, **heads, **told, **given}
    _require_values(path, shape, values)
    assumed = [key for key in ("num_attention_heads", "num_key_value_heads", "rope_theta") if key not in told]
    if shape.experts:
        assumed += [key for key in ("num_experts_per_tok",) if key not in given]
        if not 1 <= values["num_experts_per_tok"] <= shape.experts:
            problem = f"model.config.num_experts_per_tok: must be from 1 to {shape.experts}, the experts of a layer"
            raise ConfigError(str(path), [problem])
        if "norm_topk_prob" not in given and shape.generation != "minimind-3":
            values["norm_topk_prob"] = values["num_experts_per_tok"] > 1  # one expert keeps the router's weight
    found = _for_transformers(shape, values, is_tied)
    return Settings(_model_type(shape), found, {key: values[key] for key in assumed})


def _as_number(value: Any) -> Any:
    """1e6 is a text in YAML 1.1."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _pair_heads(shape: Shape, given: Mapping[str, Any]) -> dict[str, int]:
    """The number of heads that follows from the other one and the tensors, where one of both is given."""
    sizes = {"num_attention_heads": shape.q_size, "num_key_value_heads": shape.kv_size}
    own = [key for key in sizes if key in given]
    if len(own) != 1 or _find_bad_value(own[0], given[own[0]]):
        return {}
    (other,) = set(sizes) - set(own)
    return {other: given[own[0]] * sizes[other] // sizes[own[0]]}


_COUNTS = ("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "max_position_embeddings")
_NUMBERS = {"rope_theta": 1.0, "rms_norm_eps": 0.0, "router_aux_loss_coef": 0.0, "attention_dropout": 0.0}  # smallest


def _find_bad_value(key: str, value: Any) -> str:
    if key == "norm_topk_prob":
        return "" if isinstance(value, bool) else "must be true or false"
    if key in _COUNTS:
        return "" if type(value) is int and value >= 1 else "must be a whole number of 1 or more"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "" if is_number and math.isfinite(value) and value >= _NUMBERS[key] else f"must be {_NUMBERS[key]:g} or more"


def _require_values(path: Path, shape: Shape, values: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: a value is not of its kind, or the numbers of heads do not divide the tensors.
    """
    heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
    problems = [
        f"model.config.{key}: {problem}, not {str(values[key])[:60]!r}"
        for key in FREE_KEYS
        if key in values and (problem := _find_bad_value(key, values[key]))
    ]
    rows = (shape.q_size, shape.kv_size)
    if not problems and (rows[0] % heads or rows[1] % shared or rows[0] // heads != rows[1] // shared):
        problems.append(
            f"model.config.num_attention_heads {heads}, num_key_value_heads {shared}: do not divide the {shape.q_size} "
            f"rows of q_proj and the {shape.kv_size} of k_proj into heads of one size; their ratio must be "
            f"{shape.q_size / shape.kv_size:g}"
        )
    elif not problems and (heads % shared or shape.q_size // heads % 2):
        problems.append(
            f"model.config.num_attention_heads {heads}: must be a multiple of num_key_value_heads {shared}, with heads "
            "of an even size"
        )
    elif not problems and shape.head_dim and rows[0] // heads != shape.head_dim:
        problems.append(
            f"model.config.num_attention_heads {heads}: q_norm says {rows[0] // shape.head_dim}; leave it out"
        )
    if problems:
        raise ConfigError(str(path), problems)


def _model_type(shape: Shape) -> str:
    if shape.generation == "minimind-3":
        return "qwen3_moe" if shape.experts else "qwen3"
    return "qwen2_moe" if shape.experts else "llama"


def _for_transformers(shape: Shape, values: Mapping[str, Any], is_tied: bool) -> dict[str, Any]:
    found = {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": values["num_attention_heads"], "num_key_value_heads": values["num_key_value_heads"],
        "head_dim": shape.q_size // values["num_attention_heads"], "intermediate_size": shape.intermediate,
        "max_position_embeddings": values["max_position_embeddings"], "rms_norm_eps": values["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(values["rope_theta"])},
        "tie_word_embeddings": is_tied, "attention_dropout": values["attention_dropout"],
    }  # fmt: skip
    if shape.experts:
        found |= {
            "num_experts": shape.experts, "num_experts_per_tok": values["num_experts_per_tok"],
            "moe_intermediate_size": shape.intermediate, "norm_topk_prob": values["norm_topk_prob"],
            "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": values["router_aux_loss_coef"],
        }  # fmt: skip
    if shape.shared:
        found |= {"shared_expert_intermediate_size": shape.shared * shape.intermediate, "qkv_bias": False}
    return found


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The free fields of a config.json, as model.config takes them."""
    found = {key: config[key] for key in FREE_KEYS if key in config}
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    return found
