"""The reference: attention document by document. Every other kernel must give the same."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 1024  # queries per block where scores are computed explicitly
HALVES = (torch.bfloat16, torch.float16)
SHORT = 512  # tokens; below, a CPU's kernel in half precision is slower than that in float32, up to 3 times


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """What a layer asks of its attention.

    Attributes:
        window: number of tokens that a token sees, itself included; None: all before it.
        softcap: scores are capped to softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [heads], the logit of an attention sink per head (gpt-oss).
    """

    scale: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend_documents(query: Tensor, key: Tensor, value: Tensor, lens: list[int], options: LayerOptions) -> Tensor:
    """Causal attention within each document; [1, heads, tokens, head_dim].

    Args:
        query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim].
        lens: tokens of each document.
    """
    outputs = []
    for q, k, v in zip(query.split(lens, 2), key.split(lens, 2), value.split(lens, 2), strict=True):
        window = options.window if options.window and options.window < q.shape[2] else None
        if options.softcap is not None or options.sinks is not None:
            outputs.append(_attend_by_hand(q, k, v, window, options))
        elif window:
            outputs.append(_attend_in_window(q, k, v, window, options))
        else:
            outputs.append(_attend_before(q, k, v, options))
    return torch.cat(outputs, 2)


def _attend_before(q: Tensor, k: Tensor, v: Tensor, options: LayerOptions) -> Tensor:
    """Attention of all tokens to themselves and those before them, in the dtype of autocast if that is on."""
    device, dtype = q.device.type, q.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    is_short = device == "cpu" and dtype in HALVES and q.shape[2] < SHORT
    with torch.autocast(device, enabled=False) if is_short else nullcontext():
        output = F.scaled_dot_product_attention(
            *((q.float(), k.float(), v.float()) if is_short else (q, k, v)), is_causal=True, scale=options.scale,
            dropout_p=options.dropout, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    return output.to(dtype) if is_short else output


def band(start: int, stop: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    """[stop - start, stop - first_key] bool: which keys from first_key on are visible to queries start..stop."""
    queries = torch.arange(start, stop, device=device)[:, None]
    keys = torch.arange(first_key, stop, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def window_blocks(length: int, window: int) -> list[tuple[int, int, int]]:
    """Blocks of `window` queries: first query, end of the queries and keys, first visible key."""
    starts = range(0, length, window)
    return [(start, min(start + window, length), max(0, start - window + 1)) for start in starts]


def _attend_in_window(q: Tensor, k: Tensor, v: Tensor, window: int, options: LayerOptions) -> Tensor:
    """Attention of blocks of `window` queries to the at most 2 * window keys that they can see."""
    outputs = []
    for start, stop, first in window_blocks(q.shape[2], window):
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, first:stop],
                v[:, :, first:stop],
                attn_mask=band(start, stop, first, window, q.device),
                scale=options.scale,
                dropout_p=options.dropout,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, 2)


def _attend_by_hand(q: Tensor, k: Tensor, v: Tensor, window: int | None, options: LayerOptions) -> Tensor:
    """Softmax attention in blocks of queries, for features that torch's kernel lacks (softcap, sinks)."""
    softcap, sinks = options.softcap, options.sinks
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outputs = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[2])
        first = max(0, start - window + 1) if window else 0
        scores = q[:, :, start:stop] @ k[:, :, first:stop].transpose(-1, -2) * options.scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~band(start, stop, first, window, q.device), -math.inf)
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, stop - start, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = F.dropout(weights, options.dropout) if options.dropout else weights
        outputs.append(weights @ v[:, :, first:stop])
    return torch.cat(outputs, 2)
