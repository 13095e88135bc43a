"""Attention kernels of a GPU: variable-length flash attention, and FlexAttention where a layer needs more.

    kernel   dtypes       window   softcap, sinks   shared prefixes
    varlen   fp16, bf16   yes      no               no
    flex     and fp32     yes      yes              yes

Neither has dropout. torch's varlen ignores the gradient of its log-sum-exp, so attention sinks are no task for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.attention.varlen import varlen_attn

from tunesmith.attention.layout import PackedLayout
from tunesmith.attention.loop import LayerOptions

_HALVES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256  # of flash attention


def can_varlen(query: Tensor, options: LayerOptions) -> bool:
    is_plain = options.softcap is None and options.sinks is None and not options.dropout
    return is_plain and query.dtype in _HALVES and query.shape[-1] <= _MAX_HEAD_DIM and query.shape[-1] % 8 == 0


def can_flex(query: Tensor, options: LayerOptions) -> bool:
    return not options.dropout and query.dtype in (*_HALVES, torch.float32)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: LayerOptions) -> Tensor:
    """[1, heads, tokens, head_dim], as the loop over documents; one kernel for all of them."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    cu_seqlens, max_len = layout.cu_seqlens, layout.max_len
    # flash attention counts the tokens before the query; -1: all
    left = options.window - 1 if options.window else -1
    output: Any = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, scale=options.scale, window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    found: Tensor = output.transpose(0, 1)[None]
    return found


def attend_flex(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: LayerOptions) -> Tensor:
    """The same by FlexAttention, also of prefix trees."""
    cap, sinks = options.softcap or 0.0, options.sinks

    def cap_score(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    is_compiled = torch.compiler.is_compiling()  # with the layer around it
    attend: Any = flex_attention if is_compiled else compiled_flex(query.device.type)
    output, extra = attend(
        query, key, value,
        score_mod=cap_score if cap else None,
        block_mask=layout.masks[options.window],
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )  # fmt: skip
    if sinks is not None:  # a key without a value: it takes its share of the weights
        share = torch.sigmoid(extra.lse - sinks.to(extra.lse.dtype)[None, :, None])
        output = output * share.to(output.dtype)[..., None]
    found: Tensor = output
    return found


@functools.cache
def compiled_flex(device_type: str) -> Callable[..., Any]:
    """FlexAttention as one kernel; uncompiled, it holds all scores. On a CPU it is for tests of its mathematics."""
    if device_type == "cpu":
        return flex_attention
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


KERNELS: dict[str, tuple[Callable[..., bool], Callable[..., Tensor]]] = {
    "varlen": (can_varlen, attend_varlen),
    "flex": (can_flex, attend_flex),
}
