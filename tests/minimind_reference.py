"""Models of MiniMind's three generations written out: tensors as its classes name them, and the logits they compute.

An implementation of its own, from the architecture's description, to compare imported files with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    generation: str
    hidden: int = 32
    layers: int = 2
    heads: int = 8
    kv_heads: int = 2
    inner: int = 64
    vocab: int = 400
    experts: int = 0
    shared: int = 0
    top_k: int = 2
    theta: float = 1e6
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def sizes_of(generation: str, is_moe: bool, **others: int) -> Sizes:
    """Small sizes with the numbers that MiniMind's config classes hold by default."""
    values: dict[str, float | int] = {"kv_heads": 4, "top_k": 1, "eps": 1e-6} if generation == "minimind-3" else {}
    if is_moe:
        values |= {"experts": 4, "shared": 0 if generation == "minimind-3" else 1}
    return Sizes(generation, **(values | others))  # type: ignore[arg-type]


def make_state(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Random tensors by MiniMind's names; the head is the embedding."""
    torch.manual_seed(seed)
    old = sizes.generation == "2024"
    hidden, kv = sizes.hidden, sizes.kv_heads * sizes.head_dim

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape) * 0.2).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + torch.randn(size) * 0.2).to(dtype)

    root = "" if old else "model."
    embedding = random(sizes.vocab, hidden)
    state = {
        ("tok_embeddings" if old else "model.embed_tokens") + ".weight": embedding,
        ("output" if old else "lm_head") + ".weight": embedding,
        f"{root}norm.weight": norm(hidden),
    }
    names = dict(
        zip("qkvo", ("wq", "wk", "wv", "wo") if old else ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True)
    )
    gate, up, down = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
    for layer in range(sizes.layers):
        at = f"{root}layers.{layer}."
        attention = at + ("attention." if old else "self_attn.")
        mlp = at + ("feed_forward." if old else "mlp.")
        state[attention + names["q"] + ".weight"] = random(hidden, hidden)
        state[attention + names["k"] + ".weight"] = random(kv, hidden)
        state[attention + names["v"] + ".weight"] = random(kv, hidden)
        state[attention + names["o"] + ".weight"] = random(hidden, hidden)
        if sizes.generation == "minimind-3":
            state[attention + "q_norm.weight"] = norm(sizes.head_dim)
            state[attention + "k_norm.weight"] = norm(sizes.head_dim)
        state[at + ("attention_norm" if old else "input_layernorm") + ".weight"] = norm(hidden)
        state[at + ("ffn_norm" if old else "post_attention_layernorm") + ".weight"] = norm(hidden)
        parts = [""]
        if sizes.experts:
            state[mlp + "gate.weight"] = random(sizes.experts, hidden)
            parts = [f"experts.{number}." for number in range(sizes.experts)]
            parts += ["shared_experts."] if old else [f"shared_experts.{number}." for number in range(sizes.shared)]
        for part in parts:
            state[f"{mlp}{part}{gate}.weight"] = random(sizes.inner, hidden)
            state[f"{mlp}{part}{up}.weight"] = random(sizes.inner, hidden)
            state[f"{mlp}{part}{down}.weight"] = random(hidden, sizes.inner)
    return state


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, sizes: Sizes) -> Tensor:
    """x: [tokens, heads, head_dim]."""
    tokens, _, size = x.shape
    angles = torch.outer(torch.arange(tokens), sizes.theta ** (-torch.arange(0, size, 2) / size))
    if sizes.generation == "2024":  # a complex number of each two neighbours
        turned = (
            torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            * torch.polar(torch.ones_like(angles), angles)[:, None]
        )
        return torch.view_as_real(turned).flatten(-2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def logits(state: State, sizes: Sizes, ids: Tensor) -> Tensor:
    """[tokens, vocabulary] in fp32, of a 1-D tensor of ids."""
    old = sizes.generation == "2024"
    root = "" if old else "model."
    w = {name: tensor.float() for name, tensor in state.items()}
    x = w[("tok_embeddings" if old else "model.embed_tokens") + ".weight"][ids]
    for layer in range(sizes.layers):
        at = f"{root}layers.{layer}."
        own = {name.removeprefix(at): tensor for name, tensor in w.items() if name.startswith(at)}
        first, second = ("attention_norm", "ffn_norm") if old else ("input_layernorm", "post_attention_layernorm")
        x = x + attend(own, rms_norm(x, own[first + ".weight"], sizes.eps), sizes)
        x = x + feed_forward(own, rms_norm(x, own[second + ".weight"], sizes.eps), sizes)
    x = rms_norm(x, w[root + "norm.weight"], sizes.eps)
    return x @ w[("output" if old else "lm_head") + ".weight"].T


def attend(own: State, x: Tensor, sizes: Sizes) -> Tensor:
    names = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    if sizes.generation != "2024":
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    q, k, v = ((x @ own[name + ".weight"].T).unflatten(-1, (-1, sizes.head_dim)) for name in names[:3])
    if sizes.generation == "minimind-3":
        q, k = (rms_norm(t, own[f"self_attn.{n}_norm.weight"], sizes.eps) for t, n in ((q, "q"), (k, "k")))
    q, k = rotate(q, sizes), rotate(k, sizes)
    times = sizes.heads // sizes.kv_heads
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(sizes.head_dim)
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ own[names[3] + ".weight"].T


def feed_forward(own: State, x: Tensor, sizes: Sizes) -> Tensor:
    old = sizes.generation == "2024"
    mlp = "feed_forward." if old else "mlp."
    gate, up, down = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")

    def expert(part: str, x: Tensor) -> Tensor:
        a, b, c = (own[f"{mlp}{part}{name}.weight"] for name in (gate, up, down))
        return (F.silu(x @ a.T) * (x @ b.T)) @ c.T

    if not sizes.experts:
        return expert("", x)
    weights, chosen = (x @ own[mlp + "gate.weight"].T).softmax(-1).topk(sizes.top_k, -1)
    if sizes.top_k > 1 or sizes.generation == "minimind-3":
        weights = weights / weights.sum(-1, keepdim=True)
    result = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, number in zip(weights[token], chosen[token], strict=True):
            result[token] += weight * expert(f"experts.{int(number)}.", x[token : token + 1])[0]
    for part in ["shared_experts."] if old else [f"shared_experts.{n}." for n in range(sizes.shared)]:
        if sizes.shared:
            result = result + expert(part, x)
    return result
