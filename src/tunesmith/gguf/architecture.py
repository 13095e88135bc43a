"""The config of a model as GGUF metadata, and what llama.cpp's graph of its architecture cannot compute.

llama.cpp has a graph for each architecture. A field of a transformers config is read here and carried over, or does
not change the logits, or must have the value that the graph assumes. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.gguf.rope import NoRopeForm, describe_rope

# fields that do not change the logits of a finished model
_IRRELEVANT = frozenset({
    "_name_or_path", "_sliding_window_pattern", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id",
    "chunk_size_feed_forward",
    "dtype", "embd_pdrop", "eos_token_id", "experts_implementation", "id2label", "initializer_range", "label2id",
    "model_type", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "router_aux_loss_coef",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
_SIZES = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings",
})  # fmt: skip
_GPT2_SIZES = frozenset({
    "vocab_size", "n_layer", "n_positions", "n_embd", "n_inner", "n_head", "layer_norm_epsilon", "tie_word_embeddings",
})  # fmt: skip
_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_EXPERTS = frozenset({
    "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers",
    "decoder_sparse_step",
})  # fmt: skip
_GEMMA = frozenset({"sliding_window", "layer_types", "query_pre_attn_scalar"})
_GEMMA_GELU = ("gelu_pytorch_tanh", "gelu_new")
# llama.cpp divides Gemma's scores by the square root of the hidden size per head in the model with so many layers,
# and of head_dim in all others
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True, slots=True)
class Form:
    """How a model is written in GGUF.

    Attributes:
        name: llama.cpp's name of the architecture.
        metadata: keys without the architecture's prefix.
        permuted: heads of q_proj and k_proj, whose rows llama.cpp reads in another order; empty if it does not.
        norm_offset: added to the weights of RMS norms.
        query_scale: factor of the queries, for a scale of the scores that llama.cpp does not read.
        shared_scale: factor of the shared expert's output, in place of a gate of zeros.
        writes_head: whether a tied head is written as well.
        rope_factors: content of rope_freqs.weight; empty if there is none.
        remark: what is unusual about this form.
    """

    name: str
    metadata: Mapping[str, Any]
    permuted: Mapping[str, int] = field(default_factory=dict)
    norm_offset: float = 0.0
    query_scale: float = 1.0
    shared_scale: float | None = None
    writes_head: bool = False
    rope_factors: list[float] = field(default_factory=list)
    remark: str = ""


class _NoForm(Exception):
    """What has no GGUF form."""


def describe_model(name: str, config: Any, has_zero_gates: bool = False) -> Form:
    """The GGUF form of a model.

    Args:
        name: for messages.
        config: transformers' config of a causal language model.
        has_zero_gates: whether the gates of all shared experts are zero (MiniMind's models have none).

    Raises:
        ModelError: the architecture, or a value of its config, has no GGUF form.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"{name}: model_type {config.model_type} cannot be exported to GGUF here. These can: "
            f"{', '.join(FAMILIES)}. llama.cpp's convert_hf_to_gguf.py knows more architectures.",
            code="no-gguf-form",
        )
    try:
        _require_usual(config, family)
        if config.model_type == "qwen2_moe" and config.norm_topk_prob:
            return _ungated_experts(config, has_zero_gates)
        return family.describe(config)
    except (_NoForm, NoRopeForm) as error:
        raise ModelError(
            f"{name}: {error} has no GGUF form: llama.cpp's graph of {config.model_type} does not read it, so the "
            "exported model would compute other logits. Serve the Hugging Face folder instead (tunesmith serve).",
            code="no-gguf-form",
        ) from None


def _require_usual(config: Any, family: _Family) -> None:
    """Fields that are neither carried over nor irrelevant must have their usual value."""
    usual = type(config)().to_dict()
    names = {written: name for name, written in config.attribute_map.items()}
    for key, value in config.to_dict().items():
        if key not in usual or {key, names.get(key)} & (_IRRELEVANT | family.carried):
            continue  # a key that transformers does not know is not read by its model either
        allowed = family.fixed.get(key, (usual[key],))
        if value not in allowed:
            raise _NoForm(f"{key} {value!r}")


def _head_dim(config: Any) -> int:
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def _decoder(config: Any) -> dict[str, Any]:
    """What all architectures with RMS norms and rotary embeddings have."""
    head = _head_dim(config)
    if head % 2:
        raise _NoForm(f"head_dim {head}, an odd number,")
    return {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _require_full_attention(config: Any) -> None:
    """The graphs of these architectures have no sliding window."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False and config.model_type == "qwen3_moe":
        window = None
    kinds = set(getattr(config, "layer_types", None) or ("sliding_attention",))
    if others := kinds - {"sliding_attention", "full_attention"}:
        raise _NoForm(f"layer_types with {min(others)}")
    if window is not None and "sliding_attention" in kinds and window < config.max_position_embeddings:
        raise _NoForm(f"sliding_window {window}")


def _require_square(config: Any) -> None:
    if _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise _NoForm(f"head_dim {_head_dim(config)}, which times the heads is not hidden_size,")


def _llama(config: Any) -> Form:
    metadata = _decoder(config)
    rope = describe_rope(config.rope_parameters, _head_dim(config), config.max_position_embeddings, reads_factors=True)
    return Form("llama", metadata | dict(rope.metadata), _permuted(config), rope_factors=rope.factors)


def _permuted(config: Any) -> dict[str, int]:
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}


def _qwen(config: Any) -> Form:
    """Qwen2 and Qwen3."""
    _require_full_attention(config)
    if config.model_type == "qwen2":
        _require_square(config)
    rope = describe_rope(config.rope_parameters, _head_dim(config), config.max_position_embeddings)
    return Form(config.model_type, _decoder(config) | dict(rope.metadata))


def _experts(config: Any) -> dict[str, Any]:
    """Metadata of a mixture of experts in every layer.

    Raises:
        _NoForm: a layer has none.
    """
    _require_full_attention(config)
    if config.mlp_only_layers:
        raise _NoForm(f"mlp_only_layers {config.mlp_only_layers}")
    if config.decoder_sparse_step != 1:
        raise _NoForm(f"decoder_sparse_step {config.decoder_sparse_step}")
    rope = describe_rope(config.rope_parameters, _head_dim(config), config.max_position_embeddings)
    return _decoder(config) | dict(rope.metadata) | {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }  # fmt: skip


def _qwen3_moe(config: Any) -> Form:
    # llama.cpp divides the chosen experts' weights by their sum; all experts together sum to 1 anyway
    if not config.norm_topk_prob and config.num_experts_per_tok < config.num_experts:
        raise _NoForm("norm_topk_prob False")
    return Form("qwen3moe", _experts(config))


def _qwen2_moe(config: Any) -> Form:
    _require_square(config)
    size = {"expert_shared_feed_forward_length": config.shared_expert_intermediate_size}
    return Form("qwen2moe", _experts(config) | size, writes_head=True)


def _ungated_experts(config: Any, has_zero_gates: bool) -> Form:
    """Qwen2-MoE with normalized weights, as MiniMind's; llama.cpp's qwen2moe has no such form, its bailingmoe has.

    There the shared expert has no gate, so a gate of zeros becomes a factor of sigmoid(0) in its last weight.
    """
    if config.num_experts_per_tok == config.num_experts:
        return _qwen2_moe(config)
    if not has_zero_gates:
        raise _NoForm("norm_topk_prob True with a gate on the shared expert")
    shared, rest = divmod(config.shared_expert_intermediate_size, config.moe_intermediate_size)
    if rest or not shared:
        raise _NoForm(
            f"shared_expert_intermediate_size {config.shared_expert_intermediate_size}, which is not a multiple of "
            "moe_intermediate_size,"
        )
    more = {
        "expert_shared_count": shared,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
        "leading_dense_block_count": 0,
    }
    return Form(
        "bailingmoe", _experts(config) | more, _permuted(config), shared_scale=0.5, writes_head=True,
        remark="written as bailingmoe, which computes the same: llama.cpp's qwen2moe has no normalized expert weights",
    )  # fmt: skip


def _gpt2(config: Any) -> Form:
    metadata = {
        "vocab_size": config.vocab_size,
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }
    return Form("gpt2", metadata)


def _gemma2(config: Any) -> Form:
    if not config.tie_word_embeddings:
        raise _NoForm("tie_word_embeddings False")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, key):
            raise _NoForm(f"{key} {getattr(config, key)!r}")
    rope = describe_rope(config.rope_parameters, _head_dim(config), config.max_position_embeddings)
    caps = {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }
    metadata = _decoder(config) | dict(rope.metadata) | caps | _sliding(config, 2)
    return Form("gemma2", metadata, norm_offset=1.0, query_scale=_query_scale(config, "gemma2"))


def _gemma3(config: Any) -> Form:
    everywhere, local = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise _NoForm(f"rope_type {local['rope_type']!r} of sliding layers")
    describe_rope(local, _head_dim(config), config.max_position_embeddings)  # refuses other fields
    rope = describe_rope(everywhere, _head_dim(config), config.max_position_embeddings)
    if rope.metadata.get("rope.scaling.type") == "yarn":
        raise _NoForm("rope_type 'yarn'")
    metadata = _decoder(config) | dict(rope.metadata) | _sliding(config, 6)
    metadata["rope.freq_base_swa"] = float(local["rope_theta"])
    return Form("gemma3", metadata, norm_offset=1.0, query_scale=_query_scale(config, "gemma3"))


def _sliding(config: Any, usual: int) -> dict[str, Any]:
    """Sliding layers, of which llama.cpp wants a period: every n-th layer attends to everything.

    Args:
        usual: the period that llama.cpp assumes for the architecture.
    """
    kinds, layers = config.layer_types, config.num_hidden_layers
    if others := set(kinds) - {"sliding_attention", "full_attention"}:
        raise _NoForm(f"layer_types with {min(others)}")
    slides = [kind == "sliding_attention" for kind in kinds]
    periods = (usual, *range(1, layers + 2))
    found = next((n for n in periods if slides == [layer % n < n - 1 for layer in range(layers)]), None)
    if found is None:
        raise _NoForm(f"layer_types {kinds}, which is not periodic,")
    window = config.sliding_window or config.max_position_embeddings
    metadata: dict[str, Any] = {"attention.sliding_window": int(window)}
    return metadata | ({} if found == usual else {"attention.sliding_window_pattern": found})


def _query_scale(config: Any, name: str) -> float:
    """Factor of the queries that gives the config's scale of the scores."""
    head = _head_dim(config)
    assumed = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == _GEMMA_27B[name] else head
    return float((assumed / config.query_pre_attn_scalar) ** 0.5)


@dataclass(frozen=True, slots=True)
class _Family:
    """An architecture of transformers.

    Attributes:
        carried: fields that `describe` reads.
        fixed: fields whose allowed values are not just the config class's default.
    """

    describe: Callable[[Any], Form]
    carried: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_SILU = {"hidden_act": ("silu", "swish")}
FAMILIES: Mapping[str, _Family] = {
    # biases: their tensors are written where the model has them
    "llama": _Family(_llama, _SIZES | {"attention_bias", "mlp_bias"}, _SILU),
    "qwen2": _Family(_qwen, _SIZES | _WINDOWS, _SILU),
    "qwen3": _Family(_qwen, _SIZES | _WINDOWS, _SILU),
    "qwen2_moe": _Family(
        _qwen2_moe, _SIZES | _WINDOWS | _EXPERTS | {"shared_expert_intermediate_size", "qkv_bias"}, _SILU
    ),
    "qwen3_moe": _Family(_qwen3_moe, _SIZES | _WINDOWS | _EXPERTS, _SILU),
    "gpt2": _Family(
        _gpt2,
        _GPT2_SIZES,
        {"activation_function": ("gelu_new", "gelu_pytorch_tanh")},
    ),
    "gemma2": _Family(
        _gemma2,
        _SIZES | _GEMMA | {"attn_logit_softcapping", "final_logit_softcapping"},
        {"hidden_activation": _GEMMA_GELU, "use_bidirectional_attention": (None, False)},
    ),
    "gemma3_text": _Family(
        _gemma3,
        _SIZES | _GEMMA,
        {"hidden_activation": _GEMMA_GELU, "use_bidirectional_attention": (None, False)},
    ),
}  # fmt: skip
"""By transformers' model_type."""
