"""Test at start whether rows of this model can be computed together: batched logits must equal those of single rows.

Decided by the model at hand, not by its name: convolutions, state-space layers, caches of another form and attention
that does not go through transformers' interface all show in the logits, or fail.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.caches.attention import LayoutProbe, configs_of, swapped_attention
from tunesmith.caches.packed import PackedRows
from tunesmith.caches.rows import CachedRow
from tunesmith.caches.store import Layout

_LENGTHS = (5, 19)  # few forwards: of a large model on a CPU, each takes seconds
_STEPS = 2
_LONGEST_WINDOW = 1024  # a longer one is not probed, since that would take too long
_CHUNK = 12
_EXACT, _ROUGH = 1e-4, 0.05  # allowed error of a row's logits relative to their norm: fp32, half precision
_MEMORY = 1 << 40


@dataclass(frozen=True, slots=True)
class CacheCheck:
    """How a model's rows are computed.

    Attributes:
        layout: of its attention layers; None: rows run one by one.
        bytes_a_token: of a row's cache.
        remark: why rows run one by one; "" where they run together.
    """

    layout: Layout | None
    bytes_a_token: int
    remark: str = ""


def check_cache(model: nn.Module, longest: int | None) -> CacheCheck:
    """Whether rows can be computed together.

    Args:
        longest: the model's context in tokens, if known.
    """
    if rope := _moving_rope(model):
        return CacheCheck(None, _measure_bytes(model), f"its {rope} positions depend on the longest row of a batch")
    try:
        layout = _find_layout(model)
        ratios = _compare(model, layout, longest)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models may fail in any way with an attention function that they do not know
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        return CacheCheck(None, _measure_bytes(model), f"batching fails on this model ({why})")
    is_half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    # rounding in half precision may send single tokens to another expert; a row that sees wrong tokens is off in all
    wrong = [ratio for ratio in ratios if not ratio <= (_ROUGH if is_half else _EXACT)]
    if len(wrong) > (len(ratios) // 4 if is_half else 0):
        return CacheCheck(None, _measure_bytes(model), f"batched and single logits differ by {max(ratios):.1e}")
    return CacheCheck(layout, layout.bytes_a_token)


def _moving_rope(model: nn.Module) -> str | None:
    """Kind of rope that changes for all rows with the longest one."""
    config: Any = getattr(model, "config", None)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {} if config is not None else {}
    nested = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    return next((one["rope_type"] for one in nested if one.get("rope_type") in ("dynamic", "longrope")), None)


@torch.no_grad()
def _find_layout(model: nn.Module) -> Layout:
    probe = LayoutProbe()
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with swapped_attention(configs_of(model)):
        model(input_ids=ids, position_ids=torch.arange(2, device=ids.device)[None], use_cache=False, cached_rows=probe)
    if not probe.layout.shapes:
        raise ValueError("its attention does not go through transformers' interface")
    return probe.layout


def _compare(model: nn.Module, layout: Layout, longest: int | None) -> list[float]:
    """Error of the logits at each step of each row: batched with other rows, and prompts in chunks, against alone."""
    config: Any = model.config
    text = config.get_text_config()
    lengths = [length for length in _LENGTHS if longest is None or length + _STEPS <= longest] or [1]
    window = getattr(text, "sliding_window", None)
    if isinstance(window, int) and window <= _LONGEST_WINDOW and window + 9 + _STEPS <= (longest or window * 2):
        lengths.append(window + 9)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, text.vocab_size, (n + _STEPS,), generator=generator).tolist() for n in lengths]
    packed = _logits(PackedRows(model, layout, _MEMORY, max(lengths) + _STEPS), rows, lengths)
    return [
        _error(one, other)
        for mine, ids in zip(packed, rows, strict=True)
        for one, other in zip(mine, _logits_alone(model, ids), strict=True)
    ]


def _error(one: Tensor, other: Tensor) -> float:
    """Difference relative to `other`; what is not finite, as with damaged weights, must be so in both."""
    finite = other.isfinite()
    if not torch.equal(finite, one.isfinite()):
        return math.inf
    return float((one - other)[finite].norm() / other[finite].norm().clamp_min(1e-30))


@torch.no_grad()
def _logits_alone(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """The last logits of a text, which the model reads at once with its own attention and without a cache."""
    given: dict[str, Any] = {"input_ids": torch.tensor([ids], device=next(model.parameters()).device)}
    takes = inspect.signature(model.forward).parameters
    given |= {name: value for name, value in (("use_cache", False), ("logits_to_keep", _STEPS + 1)) if name in takes}
    logits: Tensor = model(**given).logits[0, -_STEPS - 1 :].float()
    return logits


def _logits(engine: PackedRows, texts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[Tensor]]:
    """Logits behind each row's prompt and behind each of the given tokens that follow it."""
    pairs = zip(texts, lengths, strict=True)
    rows = [CachedRow(number, "base", ids[:length], _STEPS) for number, (ids, length) in enumerate(pairs)]
    found: list[list[Tensor]] = [[] for _ in rows]
    for row in rows:
        engine.admit(row)
    reading = list(rows)
    while any(len(logits) <= _STEPS for logits in found):
        done, logits = engine.forward("base", [(row, min(_CHUNK, row.pending)) for row in reading])
        for row, one in zip(done, logits, strict=True):
            found[row.number].append(one)
            if row in reading:
                reading.remove(row)
                engine.settle(row)
            if len(found[row.number]) > _STEPS:
                engine.leave(row, is_kept=False)
            else:
                row.ids.append(texts[row.number][len(row.ids)])
                engine.grow(row)
    return found


@torch.no_grad()
def _measure_bytes(model: nn.Module) -> int:
    """Bytes a token of the model's own cache, by one short forward; 0 where it has none that can be measured."""
    ids = torch.zeros(1, 8, dtype=torch.long, device=next(model.parameters()).device)
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    tensors = [value for layer in getattr(cache, "layers", []) for value in vars(layer).values()]
    sizes = [value.numel() * value.element_size() for value in tensors if isinstance(value, Tensor)]
    return sum(sizes) // 8
