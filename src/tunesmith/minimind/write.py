"""Write a model as a .pth that MiniMind's own classes open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tunesmith.errors import ModelError
from tunesmith.files import lost_write
from tunesmith.minimind.names import to_minimind
from tunesmith.minimind.settings import FREE_KEYS, default_settings, settings_of
from tunesmith.tensors import is_same_bits

_KINDS = {
    "llama": ("2025", "2024"), "qwen2_moe": ("2025", "2024"), "qwen3": ("minimind-3",), "qwen3_moe": ("minimind-3",),
}  # fmt: skip
_GATE = "shared_expert_gate.weight"
# fields of a config that change nothing that the file has to hold
_NO_MATTER = (
    "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "output_router_logits",
    "pad_token_id", "transformers_version", "use_cache", "experts_implementation", "attn_implementation",
    "max_window_layers",
    "chunk_size_feed_forward", "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "id2label", "label2id", "torch_dtype", "name_or_path", "pretraining_tp",
)  # fmt: skip
_CLASS_NAMES = {  # of what a person has to set there, by ours: minimind-3 and 2025; 2024
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "n_kv_heads"),
    "head_dim": ("head_dim", "dim // n_heads"), "rope_theta": ("rope_theta", "rope_theta"),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"), "intermediate_size": ("intermediate_size", "hidden_dim"),
    "num_experts": ("num_experts (n_routed_experts)", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "num_experts_per_tok"),
    "norm_topk_prob": ("norm_topk_prob", "norm_topk_prob"), "vocab_size": ("vocab_size", "vocab_size"),
    "n_shared_experts": ("n_shared_experts", "n_shared_experts"),
    "tie_word_embeddings": ("tie_word_embeddings", "tie_word_embeddings"),
}  # fmt: skip
VOCABULARY = 6400  # MiniMind's own


def choose_generation(name: str, model_type: str, wanted: str | None) -> str:
    """The form to write.

    Raises:
        ModelError: MiniMind has no such architecture, or not in that generation.
    """
    possible = _KINDS.get(model_type)
    if possible is None:
        raise ModelError(
            f"{name}: is of architecture {model_type}; MiniMind's files hold llama, qwen2_moe, qwen3 and qwen3_moe "
            "models of its own shape. Other tools open the Hugging Face folder itself.",
            code="not-a-minimind-architecture",
        )
    if wanted is not None and wanted not in possible:
        raise ModelError(
            f"{name}: a {model_type} model cannot be written as generation {wanted}, which computes something else. "
            f"Use --generation {possible[0]}.",
            code="wrong-generation",
        )
    return wanted or possible[0]


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors by the names of transformers' files: experts apart, a tied head once."""
    state = dict(model.state_dict())
    config: Any = model.config
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    found: dict[str, Tensor] = dict(revert_weight_conversion(cast(PreTrainedModel, model), state))
    return found


def minimind_state(name: str, model: nn.Module, generation: str) -> dict[str, Tensor]:
    """The file's tensors, in half precision as MiniMind's are.

    Raises:
        ModelError: MiniMind's classes cannot compute the model, or half precision cannot hold it.
    """
    config: Any = model.config
    state = plain_state(model)
    _require_plain_gates(name, state)
    if generation != "minimind-3" and not config.tie_word_embeddings:
        head, embedding = state.get("lm_head.weight"), state["model.embed_tokens.weight"]
        if head is not None and not torch.equal(head, embedding):
            raise ModelError(
                f"{name}: has a head of its own; MiniMind's classes of generation {generation} use the embedding as "
                "head.",
                code="not-a-minimind-model",
            )
    shared = shared_experts(config)
    if generation == "2024" and shared > 1:
        raise ModelError(
            f"{name}: has {shared} shared experts; MiniMind's classes of generation 2024 have one. Use --generation "
            "2025.",
            code="wrong-generation",
        )
    turned = to_minimind(state, generation, config.num_attention_heads, config.num_key_value_heads, shared)
    half = {key: tensor.detach().to("cpu", torch.float16).contiguous().clone() for key, tensor in turned.items()}
    if bad := next((key for key, tensor in half.items() if not tensor.isfinite().all()), ""):
        raise ModelError(
            f"{name}: {bad} has values above 65,504, which half precision, and so MiniMind's file, cannot hold.",
            code="too-large-for-half",
        )
    return half


def shared_experts(config: Any) -> int:
    """Number of MiniMind's shared experts in a Qwen2-MoE's one."""
    wide = getattr(config, "shared_expert_intermediate_size", 0) if config.model_type == "qwen2_moe" else 0
    return max(1, wide // config.moe_intermediate_size) if wide else 0


def _require_plain_gates(name: str, state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if key.endswith(_GATE) and tensor.any():
            raise ModelError(
                f"{name}: {key} is not 0: its shared expert has a gate, which MiniMind's has not. Models made from a "
                "MiniMind file or new:minimind-moe keep the gate at 0.",
                code="not-a-minimind-model",
            )


def find_unlike(config: Any, reread: Any, generation: str) -> tuple[dict[str, Any], list[str]]:
    """What a file of this model does not say.

    Args:
        config: of the model.
        reread: of its file, as MiniMind's defaults would have it.

    Returns:
        model.config to open the file with, and the names of fields that MiniMind's classes do not have.
    """
    ours, theirs = _flat(config), _flat(reread)
    unlike = [key for key in sorted(set(ours) | set(theirs)) if ours.get(key) != theirs.get(key)]
    given = {key: ours[key] for key in unlike if key in FREE_KEYS}
    others = [key for key in unlike if key not in FREE_KEYS and key not in _NO_MATTER and not key.startswith("_")]
    # these follow from the number of heads
    return given, [key for key in others if key != "head_dim" or generation == "minimind-3"]


def _flat(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    layers = values.pop("layer_types", None)
    if layers and set(layers) != {"full_attention"}:
        values["layer_types"] = layers
    if not values.get("use_sliding_window", True):
        values.pop("sliding_window", None)
        values.pop("use_sliding_window")
    rope = dict(values.pop("rope_parameters", None) or {})
    values["rope_type"] = rope.pop("rope_type", "default")
    values |= rope
    values.pop("rope_scaling", None)
    if config.model_type.endswith("_moe"):
        values["num_experts"] = config.num_experts
        values.pop("num_local_experts", None)
        values.pop("intermediate_size", None)  # of dense layers, of which there are none
    return {**values, **settings_of(values)}


def what_to_set(config: Any, generation: str) -> list[str]:
    """Arguments that MiniMind's config class needs besides width and number of layers: `num_attention_heads=16`."""
    expected = default_settings(generation, config.hidden_size) | {"vocab_size": VOCABULARY}
    values = _flat(config) | {"vocab_size": config.vocab_size}
    is_moe = config.model_type.endswith("_moe")
    if is_moe:
        values |= {"intermediate_size": config.moe_intermediate_size, "n_shared_experts": shared_experts(config)}
        expected |= {"n_shared_experts": 0 if generation == "minimind-3" else 1}
    if generation == "minimind-3":
        expected |= {"tie_word_embeddings": True}
    else:
        expected.pop("head_dim")
    if not is_moe:
        for key in ("num_experts", "num_experts_per_tok", "norm_topk_prob"):
            expected.pop(key)
    if values.get("num_experts_per_tok") == 1 and generation != "minimind-3":
        expected["norm_topk_prob"] = False  # not used there with one expert
    expected.pop("router_aux_loss_coef")
    column = 1 if generation == "2024" else 0
    return [f"{_CLASS_NAMES[key][column]}={values[key]}" for key, value in expected.items() if values.get(key) != value]


def write_pth(file: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict and read it back.

    Raises:
        OSError: a write was lost without an error.
    """
    with file.open("wb") as opened:  # by itself torch reports a full disk as a RuntimeError without a number
        torch.save(dict(state), opened)
    again = torch.load(file, map_location="cpu", weights_only=True)
    if set(again) != set(state) or not all(is_same_bits(again[name], tensor) for name, tensor in state.items()):
        raise lost_write(file)
