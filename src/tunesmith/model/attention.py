"""Per-document attention for stock transformers models: each document of a pack attends only to itself.

Registered only in transformers' AttentionInterface, not as a mask function, so that no [tokens, tokens] mask of a pack
is ever built. The lengths of the documents reach this function as the keyword `documents` of model.forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.data.pack import Documents

PACKED_ATTENTION = "tunesmith_packed"
_QUERY_BLOCK = 1024  # queries per block where scores are computed explicitly


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    documents: Documents,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Args:
        query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim].
        attention_mask: always None, since no mask function is registered.
        sliding_window: number of tokens that a token sees, itself included.
        softcap: scores are capped to softcap * tanh(scores / softcap) (Gemma 2).
        s_aux: [heads], the logit of an attention sink per head (gpt-oss).

    Returns:
        [1, tokens, heads, head_dim], and None for the attention weights.
    """
    assert attention_mask is None, "packed attention takes documents, not masks"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    by_hand = softcap is not None or s_aux is not None
    doc_lens = documents.lens
    outputs = []
    for q, k, v in zip(query.split(doc_lens, 2), key.split(doc_lens, 2), value.split(doc_lens, 2), strict=True):
        length = q.shape[2]
        window = sliding_window if sliding_window and sliding_window < length else None
        if by_hand:
            outputs.append(_attend_by_hand(q, k, v, scale, dropout, window, softcap, s_aux))
        elif window:
            outputs.append(_attend_in_window(q, k, v, scale, dropout, window))
        else:
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _band(start: int, stop: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    """[stop - start, stop - first_key] bool: which keys from first_key on are visible to queries start..stop."""
    queries = torch.arange(start, stop, device=device)[:, None]
    keys = torch.arange(first_key, stop, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _attend_in_window(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int) -> Tensor:
    """Attention of blocks of `window` queries to the at most 2 * window keys that they can see."""
    outputs = []
    for start in range(0, q.shape[2], window):
        stop = min(start + window, q.shape[2])
        first = max(0, start - window + 1)
        mask = _band(start, stop, first, window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, first:stop],
                v[:, :, first:stop],
                attn_mask=mask,
                scale=scale,
                dropout_p=dropout,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, 2)


def _attend_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Softmax attention in blocks of queries, for features that torch's kernel lacks (softcap, sinks)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outputs = []
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, q.shape[2])
        first = max(0, start - window + 1) if window else 0
        scores = q[:, :, start:stop] @ k[:, :, first:stop].transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_band(start, stop, first, window, q.device), -math.inf)
        if s_aux is not None:
            sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, stop - start, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        outputs.append(weights @ v[:, :, first:stop])
    return torch.cat(outputs, 2)


def register_packed_attention() -> None:
    """Register the attention with transformers; may be called repeatedly."""
    AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(packed_attention))
