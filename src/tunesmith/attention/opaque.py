"""The loop over documents as one operation, for torch.compile: traced, it would be compiled for each batch.

`attend_documents_opaque`, for plain layers on a CPU, gives the bits of the loop, forward and backward: it calls the
kernels that scaled_dot_product_attention chooses there. `attend_by_hand_opaque` is for other layers without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tunesmith.attention.loop import HALVES, QUERY_BLOCK, SHORT, LayerOptions, attend_documents, band, window_blocks

_aten = torch.ops.aten


def _pieces(sizes: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, keys, and mask of each call of the kernel; without a mask it is causal.

    Args:
        sizes: tokens of each document, then zeros.
        window: 0: none.
    """
    begin = 0
    for length in sizes.tolist():
        if window and window < length:
            for start, stop, first in window_blocks(length, window):
                end = begin + stop
                yield (
                    slice(begin + start, end),
                    slice(begin + first, end),
                    band(start, stop, first, window, sizes.device),
                )
        elif length:
            yield slice(begin, begin + length), slice(begin, begin + length), None
        begin += length


def _as_in_loop(mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values of one call, in the dtype that the loop computes in."""
    is_short = mask is None and tensors[0].dtype in HALVES and tensors[0].shape[2] < SHORT
    return [tensor.float() for tensor in tensors] if is_short else list(tensors)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -math.inf)


@torch.library.custom_op("tunesmith::attend_documents", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """The attention, not rounded to half precision where the kernel's is not, and the logarithm of each query's sum."""
    outputs, log_sums = [], []
    for queries, keys, mask in _pieces(sizes, window):
        q, k, v = _as_in_loop(mask, query[:, :, queries], key[:, :, keys], value[:, :, keys])
        output, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=_additive(mask, q), scale=scale
        )
        outputs.append(output.to(_exact(query.dtype)))
        log_sums.append(log_sum)
    return torch.cat(outputs, 2).contiguous(), torch.cat(log_sums, 2)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    dtype = _exact(query.dtype)
    return query.new_empty(query.shape, dtype=dtype), query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op("tunesmith::attend_documents_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sums: Tensor, sizes: Tensor,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_query, d_key, d_value = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    for queries, keys, mask in _pieces(sizes, window):
        q, k, v = _as_in_loop(mask, query[:, :, queries], key[:, :, keys], value[:, :, keys])
        d_output, o = (tensor[:, :, queries].to(q.dtype) for tensor in (grad, output))
        d_q, d_k, d_v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_output, q, k, v, o, log_sums[:, :, queries], 0.0, mask is None, attn_mask=_additive(mask, q), scale=scale
        )
        d_query[:, :, queries] = d_q
        d_key[:, :, keys] += d_k  # of a window, keys belong to two blocks
        d_value[:, :, keys] += d_v
    return d_query, d_key, d_value


@_attend_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sums: Tensor, sizes: Tensor,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sizes, ctx.scale, ctx.window = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, key, value, *output, sizes)  # type: ignore[arg-type]


def _backward(ctx: object, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, output, log_sums, sizes = ctx.saved_tensors  # type: ignore[attr-defined]
    scale, window = ctx.scale, ctx.window  # type: ignore[attr-defined]
    return (*_attend_backward(grad, query, key, value, output, log_sums, sizes, scale, window), None, None, None)


_attend.register_autograd(_backward, setup_context=_keep)


def attend_documents_opaque(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, scale: float, window: int | None
) -> Tensor:
    """As `attend_documents` without dropout, softcap and sinks, for values as wide as keys.

    Args:
        sizes: int64 on the CPU, tokens of each document, then zeros.
    """
    output: Tensor = _attend(query, key, value, sizes, scale, window or 0)[0]
    return output.to(query.dtype)


@torch.library.custom_op("tunesmith::attend_by_hand", mutates_args=())
def _by_hand(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, sizes: Tensor, scale: float, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    """Zeros for the window and softcap: none."""
    options = LayerOptions(scale, window=window or None, softcap=softcap or None, sinks=sinks)
    is_half = query.dtype in HALVES
    with torch.autocast(query.device.type, query.dtype if is_half else None, enabled=is_half):  # softmax in float32
        return attend_documents(query, key, value, _lens(sizes), options).contiguous()


@_by_hand.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, sizes: Tensor, scale: float, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.custom_op("tunesmith::attend_by_hand_backward", mutates_args=())
def _by_hand_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, sizes: Tensor, scale: float,
    window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and sinks; the weights are computed once more, in blocks of queries."""
    kv_heads = key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (query, key, value)]
    d_sinks = torch.zeros(query.shape[1], dtype=dtype, device=query.device).view(kv_heads, -1)
    # [kv_heads, heads of each, tokens, head_dim]; keys and values [kv_heads, 1, tokens, head_dim]
    all_q, all_g, d_query = (t[0].unflatten(0, (kv_heads, -1)) for t in (query, grad, grads[0]))
    all_k, all_v, d_key, d_value = (t[0].unsqueeze(1) for t in (key, value, grads[1], grads[2]))
    sink = None if sinks is None else sinks.to(dtype).view(kv_heads, -1, 1)
    for queries, keys, mask in _score_blocks(sizes, window, query.device):
        q, g = (t[:, :, queries].to(dtype) for t in (all_q, all_g))
        k, v = (t[:, :, keys].to(dtype) for t in (all_k, all_v))
        scores = q @ k.mT * scale
        tanh = torch.tanh(scores / softcap) if softcap else None
        scores = (scores if tanh is None else softcap * tanh).masked_fill(~mask, -math.inf)
        log_sum = scores.logsumexp(-1) if sink is None else torch.logaddexp(scores.logsumexp(-1), sink)
        weights = torch.exp(scores - log_sum[..., None])
        d_weights = g @ v.mT
        mean = (weights * d_weights).sum(-1)
        d_scores = weights * (d_weights - mean[..., None]) * scale
        if tanh is not None:
            d_scores = d_scores * (1 - tanh.square())
        if sink is not None:
            d_sinks -= (torch.exp(sink - log_sum) * mean).sum(-1)
        d_query[:, :, queries] = d_scores @ k
        d_key[:, :, keys] += (d_scores.mT @ q).sum(1, keepdim=True)
        d_value[:, :, keys] += (weights.mT @ g).sum(1, keepdim=True)
    d_sinks = d_sinks.reshape(-1) if sinks is None else d_sinks.reshape(-1).to(sinks.dtype)
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype), d_sinks


@_by_hand_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, sizes: Tensor, scale: float,
    window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(query.dtype, torch.float32) if sinks is None else sinks.dtype
    d_sinks = query.new_empty(query.shape[1], dtype=dtype)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), d_sinks


def _score_blocks(sizes: Tensor, window: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys that some of them see, and which see which."""
    begin = 0
    for length in _lens(sizes):
        for start in range(0, length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, length)
            first = max(0, start - window + 1) if window else 0
            mask = band(start, stop, first, window or None, device)
            yield slice(begin + start, begin + stop), slice(begin + first, begin + stop), mask
        begin += length


def _lens(sizes: Tensor) -> list[int]:
    return [length for length in sizes.tolist() if length]


def _keep_by_hand(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window, ctx.softcap = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)  # type: ignore[arg-type]


def _backward_by_hand(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, sizes = ctx.saved_tensors  # type: ignore[attr-defined]
    scale, window, softcap = ctx.scale, ctx.window, ctx.softcap  # type: ignore[attr-defined]
    *grads, d_sinks = _by_hand_backward(grad, query, key, value, sinks, sizes, scale, window, softcap)
    return (*grads, None if sinks is None else d_sinks, None, None, None, None)


_by_hand.register_autograd(_backward_by_hand, setup_context=_keep_by_hand)


def attend_by_hand_opaque(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, options: LayerOptions) -> Tensor:
    """As `attend_documents` without dropout. Arguments as those of `attend_documents_opaque`."""
    output: Tensor = _by_hand(
        query, key, value, options.sinks, sizes, options.scale, options.window or 0, options.softcap or 0.0
    )
    return output
