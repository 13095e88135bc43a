"""Attention of prefix trees: each strand attends causally to itself, and wholly to what it continues.

On a CPU without softcap, sinks and a window that is shorter than the tree, torch's flash kernel computes each piece
without a mask, and the pieces are merged by the logarithms of their sums. Its backward needs the merged output and the
merged logarithms alone, so it is called piece by piece too (Dao 2023, "FlashAttention-2", section 3.1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.attention.loop import QUERY_BLOCK, LayerOptions
from tunesmith.plans.tree import Tree

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_trees(query: Tensor, key: Tensor, value: Tensor, tree: Tree, options: LayerOptions) -> Tensor:
    """[1, heads, tokens, head_dim]. Windows are counted in depth.

    Args:
        query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim].
        options: without dropout, which would draw one mask where naive packing draws several.
    """
    assert not options.dropout, "prefix trees have no dropout"
    window = options.window if options.window and options.window < max(tree.sample_lens) else None
    is_plain = window is None and options.softcap is None and options.sinks is None
    if is_plain and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        if torch.is_autocast_enabled("cpu"):  # as scaled_dot_product_attention is cast
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        found: Tensor = _TreeAttention.apply(query, key, value, tree, options.scale)  # type: ignore[no-untyped-call]
        return found
    outputs, start = [], 0
    for length, path in zip(tree.lens, tree.paths(), strict=True):
        pieces = [*path, (start, start + length)]
        k, v = (torch.cat([whole[:, :, one:two] for one, two in pieces], 2) for whole in (key, value))
        outputs.append(_attend(query[:, :, start : start + length], k, v, window, options))
        start += length
    return torch.cat(outputs, 2)


class _TreeAttention(torch.autograd.Function):
    """Groups of query heads are the kernel's batch: keys and values are expanded, not copied."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        q, k, v = _grouped(query, groups), key.expand(groups, -1, -1, -1), value.expand(groups, -1, -1, -1)
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        merged = _grouped(output, groups)
        log_sums = query.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_sum_dtype(query)).transpose(1, 2)
        start, paths = 0, tree.paths()
        for length, path in zip(tree.lens, paths, strict=True):
            own = slice(start, start + length)
            start += length
            parts = [_forward(q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scale)]
            for piece in path:
                seen = slice(*piece)
                parts.append(_forward(q[:, :, own], k[:, :, seen], v[:, :, seen], 0.0, False, scale=scale))
            if len(parts) == 1:
                merged[:, :, own], log_sums[:, :, own] = parts[0]
                continue
            sums = torch.stack([log_sum for _, log_sum in parts])
            total = torch.logsumexp(sums, 0)
            weights = (sums - total).exp_()
            mixed = parts[0][0] * weights[0, ..., None]
            for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
                mixed.addcmul_(part.to(mixed.dtype), weight[..., None])
            merged[:, :, own], log_sums[:, :, own] = mixed, total
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.tree, ctx.paths, ctx.scale = tree, paths, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        q, k, v = _grouped(query, groups), key.expand(groups, -1, -1, -1), value.expand(groups, -1, -1, -1)
        g, out = _grouped(grad, groups), _grouped(output, groups)
        # a prefix sums what many strands add to it: in half precision the later ones would be lost
        d_query, d_key, d_value = (torch.zeros_like(one, dtype=_sum_dtype(one)) for one in (query, key, value))
        d_q, start = _grouped(d_query, groups), 0
        for length, path in zip(ctx.tree.lens, ctx.paths, strict=True):
            own = slice(start, start + length)
            start += length
            for seen in (own, *(slice(*piece) for piece in path)):
                of_q, of_k, of_v = _backward(
                    g[:, :, own], q[:, :, own], k[:, :, seen], v[:, :, seen], out[:, :, own], log_sums[:, :, own],
                    0.0, seen is own, scale=ctx.scale,
                )  # fmt: skip
                d_q[:, :, own] += of_q
                d_key[:, :, seen] += of_k.sum(0, dtype=d_key.dtype)
                d_value[:, :, seen] += of_v.sum(0, dtype=d_value.dtype)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """A view [groups, kv_heads, tokens, head_dim] of [1, heads, tokens, head_dim]."""
    view: Tensor = tensor[0].unflatten(0, (-1, groups))
    return view.transpose(0, 1)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, options: LayerOptions) -> Tensor:
    """Attention where the queries are the last ones of the keys' positions."""
    before, is_grouped, scale = k.shape[2] - q.shape[2], q.shape[1] != k.shape[1], options.scale
    is_plain = options.softcap is None and options.sinks is None
    if not before and is_plain and (window is None or window >= k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped)
    outputs = []
    block = min(window or QUERY_BLOCK, QUERY_BLOCK)
    for start in range(0, q.shape[2], block):
        stop = min(start + block, q.shape[2])
        first = max(0, before + start - window + 1) if window else 0
        depths = torch.arange(before + start, before + stop, device=q.device)[:, None]
        seen_depths = torch.arange(first, before + stop, device=q.device)[None]
        seen = seen_depths <= depths
        if window:
            seen = seen & (seen_depths > depths - window)
        part = q[:, :, start:stop], k[:, :, first : before + stop], v[:, :, first : before + stop]
        if is_plain:
            outputs.append(F.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale, enable_gqa=is_grouped))
        else:
            outputs.append(_softmax(*part, seen, options))
    return torch.cat(outputs, 2)


def _softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, options: LayerOptions) -> Tensor:
    groups, softcap = q.shape[1] // k.shape[1], options.softcap
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * options.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if options.sinks is None:
        return scores.softmax(-1) @ v
    sink = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
    weights: Tensor = torch.cat([scores, sink], -1).softmax(-1)
    return weights[..., :-1] @ v
