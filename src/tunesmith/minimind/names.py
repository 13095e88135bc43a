"""Tensor names of MiniMind's three generations, and the same tensors under the names of transformers.

MiniMind (https://github.com/jingyaogong/minimind, Apache-2.0) wrote its weights in three forms:

- `2024`, class MiniMindLM, until April 2025: Llama's own names (`tok_embeddings`, `wq`, `w1`), and rotary embeddings
  that turn neighbouring values (2i, 2i + 1) instead of halves (i, i + d/2): the rows of q and k are permuted.
- `2025`, until March 2026: the names of Hugging Face; a mixture of experts has `shared_experts`, which no gate weighs.
- `minimind-3`, since: the same with `q_norm` and `k_norm`, without shared experts.

They become Llama or Qwen2-MoE, and Qwen3 or Qwen3-MoE. Qwen2-MoE weighs its shared expert by a gate: with a gate of 0,
which is sigmoid(0) = 1/2, and twice the down_proj, it computes what MiniMind does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_OLD = {
    "tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
_NEW = {new: old for old, new in _OLD.items()}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_SHARED = re.compile(r"(model\.layers\.\d+\.mlp)\.shared_experts\.(\d+)\.(\w+)\.weight")
_SHARED_GATE = ".mlp.shared_expert_gate.weight"


@dataclass(frozen=True, slots=True)
class Shape:
    """What the names and shapes of a file say.

    Attributes:
        head_dim: known in minimind-3 only, by its q_norm; else 0.
        q_size, kv_size: rows of q_proj and of k_proj.
        intermediate: rows of a gate_proj; of one expert's in a mixture of experts.
        experts, shared: routed and shared experts of a layer; 0 in a dense model.
    """

    generation: str
    vocab: int
    hidden: int
    layers: int
    head_dim: int
    q_size: int
    kv_size: int
    intermediate: int
    experts: int
    shared: int


def rename_old(name: str) -> str:
    """A module or tensor of the 2024 form, by its name in the 2025 form."""
    stem, dot, kind = name.rpartition(".") if name.endswith(".weight") else (name, "", "")
    found = _LAYER.fullmatch(stem)
    if not found:
        return _OLD.get(stem, stem) + dot + kind
    part = found[2].replace("feed_forward.shared_experts", "feed_forward.shared_experts.0")
    part = part.replace("feed_forward", "mlp")
    if part in _OLD:
        part = _OLD[part]
    else:
        head, _, last = part.rpartition(".")
        part = f"{head}.{_OLD[last]}" if last in ("w1", "w2", "w3") else part
    return f"model.layers.{found[1]}.{part}{dot}{kind}"


def rename_to_old(name: str) -> str:
    """A module or tensor of the 2025 form, by its name in the 2024 form."""
    stem, dot, kind = name.rpartition(".") if name.endswith(".weight") else (name, "", "")
    found = _LAYER.fullmatch(stem)
    if not found:
        return _NEW.get(stem, stem) + dot + kind
    part = found[2].replace("mlp.shared_experts.0", "mlp.shared_experts")
    if part in _NEW:
        part = _NEW[part]
    elif part.startswith("mlp."):
        head, _, last = part.rpartition(".")
        part = f"{head}.{_NEW.get(last, last)}".replace("mlp", "feed_forward", 1)
    return f"layers.{found[1]}.{part}{dot}{kind}"


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from neighbouring pairs to halves: [heads * head_dim, n] or [heads * head_dim]."""
    rest = weight.shape[1:]
    return weight.reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(weight.shape).contiguous()


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(weight.shape).contiguous()


def turn_heads(name: str) -> bool:
    """Whether the rows of a tensor, in the 2025 form's names, depend on the form of the rotary embedding."""
    return ".self_attn.q_proj." in name or ".self_attn.k_proj." in name


def from_minimind(
    state: Mapping[str, Tensor], shape: Shape, heads: int, kv_heads: int, is_tied: bool
) -> dict[str, Tensor]:
    """A file's tensors under transformers' names, with one tensor for each matrix of an expert."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if shape.generation == "2024":
            name = rename_old(name)
            if turn_heads(name):
                tensor = to_halves(tensor, heads if ".q_proj." in name else kv_heads)
        if not (is_tied and name == "lm_head.weight"):
            found[name] = tensor
    return _join_shared(found, shape) if shape.shared else found


def _join_shared(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Shared experts as the one of Qwen2-MoE, with a gate of 0: sums over several experts are one wider expert."""
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if found := _SHARED.fullmatch(name):
            parts.setdefault((found[1], found[3]), {})[int(found[2])] = tensor
        else:
            rest[name] = tensor
    for (layer, matrix), experts in parts.items():
        joined = torch.cat([experts[at] for at in sorted(experts)], 1 if matrix == "down_proj" else 0)
        rest[f"{layer}.shared_expert.{matrix}.weight"] = joined * 2 if matrix == "down_proj" else joined
        rest[f"{layer}.shared_expert_gate.weight"] = joined.new_zeros(1, shape.hidden)
    return rest


def to_minimind(
    state: Mapping[str, Tensor], generation: str, heads: int, kv_heads: int, shared: int
) -> dict[str, Tensor]:
    """The inverse of `from_minimind`, always with lm_head.weight, which MiniMind's strict load needs.

    Args:
        state: tensors by transformers' names, experts apart.
        shared: number of shared experts into which Qwen2-MoE's one is split; 0 without.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_SHARED_GATE):
            continue
        layer, is_shared, matrix = name.partition(".shared_expert.")
        if is_shared:
            is_down = matrix.startswith("down_proj")
            for at, part in enumerate(tensor.chunk(shared, 1 if is_down else 0)):
                found[f"{layer}.shared_experts.{at}.{matrix}"] = (part / 2 if is_down else part).contiguous()
        else:
            found[name] = tensor
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    if generation != "2024":
        return found
    turned = {}
    for name, tensor in found.items():
        if turn_heads(name):
            tensor = to_pairs(tensor, heads if ".q_proj." in name else kv_heads)
        turned[rename_to_old(name)] = tensor
    return turned


def expected_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a file, in the names of its generation."""
    hidden, inner = shape.hidden, shape.intermediate
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden), "model.norm.weight": (hidden,),
        "lm_head.weight": (shape.vocab, hidden),
    }  # fmt: skip
    mlps = [f"experts.{at}." for at in range(shape.experts)] + [f"shared_experts.{at}." for at in range(shape.shared)]
    for layer in range(shape.layers):
        own: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (shape.q_size, hidden), "self_attn.k_proj": (shape.kv_size, hidden),
            "self_attn.v_proj": (shape.kv_size, hidden), "self_attn.o_proj": (hidden, shape.q_size),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        if shape.generation == "minimind-3":
            own |= {"self_attn.q_norm": (shape.head_dim,), "self_attn.k_norm": (shape.head_dim,)}
        if shape.experts:
            own["mlp.gate"] = (shape.experts, hidden)
        for mlp in mlps or [""]:
            own |= {f"mlp.{mlp}{matrix}": (inner, hidden) for matrix in ("gate_proj", "up_proj")}
            own[f"mlp.{mlp}down_proj"] = (hidden, inner)
        found |= {f"model.layers.{layer}.{name}.weight": sizes for name, sizes in own.items()}
    return {rename_to_old(name): sizes for name, sizes in found.items()} if shape.generation == "2024" else found
