"""Per-document attention for stock transformers models: each document of a pack attends only to itself.

Registered only in transformers' AttentionInterface, not as a mask function, so that no [tokens, tokens] mask of a pack
is ever built. The layout of the batch reaches this function as the keyword `documents` of model.forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.attention.choose import kind_of
from tunesmith.attention.kernels import KERNELS
from tunesmith.attention.layout import PackedLayout
from tunesmith.attention.loop import LayerOptions, attend_documents
from tunesmith.attention.opaque import attend_by_hand_opaque, attend_documents_opaque
from tunesmith.attention.trees import attend_trees
from tunesmith.data.pack import Documents
from tunesmith.plans.tree import Tree

PACKED_ATTENTION = "tunesmith_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    documents: Documents | Tree | PackedLayout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, or in prefix trees to a token's ancestors and itself.

    Args:
        query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim].
        attention_mask: always None, since no mask function is registered.
        documents: `Documents` or `Tree` alone for the loop over them; training and evaluation give a `PackedLayout`.
        sliding_window: number of tokens that a token sees, itself included.
        softcap: scores are capped to softcap * tanh(scores / softcap) (Gemma 2).
        s_aux: [heads], the logit of an attention sink per head (gpt-oss).

    Returns:
        [1, tokens, heads, head_dim], and None for the attention weights.
    """
    assert attention_mask is None, "packed attention takes documents, not masks"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    options = LayerOptions(scale, dropout, sliding_window or None, softcap, s_aux)
    if isinstance(documents, PackedLayout):
        output = _attend_layout(query, key, value, documents, options)
    else:
        output = _loop(query, key, value, documents, options)
    return output.transpose(1, 2).contiguous(), None


def _attend_layout(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: LayerOptions) -> Tensor:
    """By the first kernel that the plan has for such layers, else document by document."""
    if layout.recorder is not None:
        layout.recorder.compare(*_as_computed(query, key, value), layout, options)
    elif layout.plan.kernels:
        q, k, v = _as_computed(query, key, value)
        for name in layout.plan.kernels.get(kind_of(q, options), ()):
            can, attend = KERNELS[name]
            if can(q, options) and (name != "varlen" or not layout.is_tree):
                return attend(q, k, v, layout, options)
    if torch.compiler.is_compiling() and not options.dropout and not layout.is_tree:
        q, k, v = _as_computed(query, key, value)
        is_plain = options.softcap is None and options.sinks is None and q.shape[-1] == v.shape[-1]
        if is_plain and q.device.type == "cpu":
            return attend_documents_opaque(q, k, v, layout.sizes, options.scale, options.window)
        return attend_by_hand_opaque(q, k, v, layout.sizes, options)
    found: Tensor = _loop(query, key, value, layout.source, options)
    return found


def _as_computed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype that scaled_dot_product_attention computes in; autocast does not know our kernels."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _loop(query: Tensor, key: Tensor, value: Tensor, documents: Any, options: LayerOptions) -> Tensor:
    """Traced, it would be compiled for the lengths of each batch."""
    if isinstance(documents, Tree):
        return attend_trees(query, key, value, documents, options)
    return attend_documents(query, key, value, documents.lens, options)


def register_packed_attention() -> None:
    """Register the attention with transformers; may be called repeatedly."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
