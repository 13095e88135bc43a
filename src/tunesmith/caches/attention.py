"""Attention of a forward over many rows at once: each token attends to the cached tokens of its own row.

A forward has the new tokens of all rows one behind another, [1, tokens], as training packs documents: no padding
anywhere, and rows of any length together. The function is registered with transformers like that of training
(model/attention.py); the rows reach it as the keyword `cached_rows` of model.forward. It writes keys and values into
the cache itself, so the model runs without a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.caches.store import Layout, RowCache, Shelf

CACHED_ATTENTION = "tunesmith_cached"


@dataclass(frozen=True, slots=True)
class Options:
    """What a layer asks of its attention; see model/attention.py."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Part(Protocol):
    """Some tokens of a forward."""

    @property
    def size(self) -> int:
        """Number of tokens."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """[heads, size, dim] each -> [size, heads, value_dim]."""


@dataclass(slots=True)
class ShelfPart:
    """One new token of each row of a shelf.

    Attributes:
        lengths: tokens of each row before the new one.
    """

    shelf: Shelf
    lengths: Sequence[int]
    _at: tuple[Tensor, Tensor] | None = None
    _masks: dict[tuple[int | None, Any], Tensor | None] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        keys, values = self.shelf.keys[layer], self.shelf.values[layer]
        if self._at is None or self._at[0].device != keys.device:
            positions = torch.tensor(self.lengths, device=keys.device)
            self._at = torch.arange(self.size, device=keys.device), positions
        places, positions = self._at
        keys[places, :, positions] = key.transpose(0, 1)
        values[places, :, positions] = value.transpose(0, 1)
        longest, kv_heads = max(self.lengths) + 1, keys.shape[1]
        # the queries that share a key head are one block of queries of that head
        grouped = query.transpose(0, 1).reshape(self.size, kv_heads, -1, query.shape[-1])
        mask = self._mask(options.window, longest, query)
        sinks = options.sinks.view(1, kv_heads, -1, 1) if options.sinks is not None else None
        seen_keys, seen_values = keys[: self.size, :, :longest], values[: self.size, :, :longest]
        found = _attend(grouped, seen_keys, seen_values, mask, options, sinks)
        return found.reshape(self.size, query.shape[0], values.shape[-1])

    def _mask(self, window: int | None, longest: int, query: Tensor) -> Tensor | None:
        """[rows, 1, 1, longest] to be added to scores; None where all rows see all."""
        window = window if window and window < longest else None
        key = (window, query.device)
        if key not in self._masks:
            if window is None and min(self.lengths) + 1 == longest:
                self._masks[key] = None
            else:
                assert self._at is not None
                last, at = self._at[1][:, None], torch.arange(longest, device=query.device)
                seen = at <= last if window is None else (at <= last) & (at > last - window)
                mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
                self._masks[key] = mask.masked_fill_(~seen, -torch.inf)[:, None, None]
        return self._masks[key]


@dataclass(slots=True)
class ChunkPart:
    """The next tokens of one row's prompt, behind `past` cached ones."""

    cache: RowCache
    past: int
    size: int
    _masks: dict[tuple[int | None, Any], Tensor | None] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        keys, values = self.cache.tensors(layer)
        end = self.past + self.size
        keys[:, self.past : end], values[:, self.past : end] = key, value
        window = options.window if options.window and options.window < end else None
        first = max(0, self.past - window + 1) if window else 0
        groups = query.shape[0] // keys.shape[0]
        own_keys, own_values = keys[None, :, first:end], values[None, :, first:end]
        if groups > 1:
            own_keys, own_values = own_keys.repeat_interleave(groups, 1), own_values.repeat_interleave(groups, 1)
        mask = self._mask(window, first, end, query)
        sinks = options.sinks.view(1, -1, 1, 1) if options.sinks is not None else None
        return _attend(query[None], own_keys, own_values, mask, options, sinks)[0].transpose(0, 1)

    def _mask(self, window: int | None, first: int, end: int, query: Tensor) -> Tensor | None:
        key = (window, query.device)
        if key not in self._masks:
            if self.size == 1:
                self._masks[key] = None
            else:
                at = torch.arange(first, end, device=query.device)
                queries = torch.arange(self.past, end, device=query.device)[:, None]
                seen = at <= queries if window is None else (at <= queries) & (at > queries - window)
                mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
                self._masks[key] = mask.masked_fill_(~seen, -torch.inf)[None, None]
        return self._masks[key]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, sinks: Tensor | None) -> Tensor:
    """Softmax attention.

    Args:
        q: [rows, heads, queries, dim]; k, v: [rows, heads, keys, dim].
        mask: broadcastable to [rows, heads, queries, keys].
        sinks: broadcastable to [rows, heads, queries, 1].
    """
    if options.softcap is None and sinks is None:
        if mask is not None:
            mask = mask.expand(len(q), 1, q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
    scores = q @ k.transpose(-1, -2) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    sinks = sinks.to(scores.dtype).expand(len(q), q.shape[1], q.shape[2], 1)
    return torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1].to(q.dtype) @ v


@dataclass(frozen=True, slots=True)
class CachedRows:
    """The rows of a forward: their parts in the order of their tokens."""

    layout: Layout
    parts: Sequence[Part]


class LayoutProbe:
    """In the place of `CachedRows`, in a forward that only notes the model's layers."""

    def __init__(self) -> None:
        self.layout = Layout()


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cached_rows: CachedRows | LayoutProbe,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, heads, tokens, dim] -> [1, tokens, heads, dim], and None for the attention weights."""
    assert attention_mask is None, "rows have no masks"
    if isinstance(cached_rows, LayoutProbe):
        cached_rows.layout.add(module, key, value)
        groups = query.shape[1] // key.shape[1]
        return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None
    options = Options(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    layer, found, start = cached_rows.layout.index[module], [], 0
    for part in cached_rows.parts:
        end = start + part.size
        found.append(part.attend(layer, query[0, :, start:end], key[0, :, start:end], value[0, :, start:end], options))
        start = end
    return (found[0] if len(found) == 1 else torch.cat(found))[None], None


@contextmanager
def swapped_attention(configs: Sequence[Any]) -> Iterator[None]:
    """Of a model's configs: the name alone is exchanged, which costs nothing in every step."""
    before = [getattr(config, "_attn_implementation_internal", None) for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = CACHED_ATTENTION
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def configs_of(model: nn.Module) -> list[Any]:
    """The config objects that a model's modules read their attention's name from."""
    AttentionInterface.register(CACHED_ATTENTION, cached_attention)
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(one): one for one in found if hasattr(one, "_attn_implementation_internal")}.values())
