"""Proof at start that documents of a pack do not see each other, on the model at hand.

Attention is ours, but a model may mix documents elsewhere: convolutions and state-space layers run across the border,
and rope that looks at the longest position of a pack (longrope, dynamic NTK) changes for all documents in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunesmith.model.attention import PACKED_ATTENTION, Documents, register_packed_attention

_SHORT_DOCS = [7, 33, 5, 20]
# Allowed difference relative to the largest hidden value: rounding stays far below, a leak far above.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class Isolation:
    """Whether packs are safe, and in words what was seen."""

    is_isolated: bool
    report: str


def set_up_attention(model: nn.Module, max_seq_len: int, micro_batch_tokens: int) -> Isolation:
    """Switch the model to packed attention and compare with its own attention on single documents.

    Where the two differ, the model is switched back to its own attention and must get one document a forward.
    """
    own = model.config._attn_implementation
    register_packed_attention()
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
    except (ValueError, NotImplementedError) as error:
        return Isolation(False, f"one document a forward: the model takes no other attention ({_first_line(error)})")
    doc_lens = choose_doc_lens(model.config.get_text_config(), max_seq_len, micro_batch_tokens)
    try:
        difference, scale = measure_difference(model, own, doc_lens)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        model.set_attn_implementation(own)
        return Isolation(False, f"one document a forward: packing fails on this model ({_first_line(error)})")
    dtype = next(model.parameters()).dtype
    limit = _TOLERANCE[dtype] * scale
    seen = f"packed and solo differ by {difference:.1e} (documents of {', '.join(map(str, doc_lens))} tokens)"
    if difference <= limit:
        return Isolation(True, f"packed: {seen}")
    model.set_attn_implementation(own)
    return Isolation(False, f"one document a forward: {seen}, so this model mixes packed documents")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def choose_doc_lens(config: Any, max_seq_len: int, micro_batch_tokens: int) -> list[int]:
    """Short documents, one longer than the sliding window, and one longer than the original context.

    Each long one only where a training pack could hold it too, beside at least one short one.
    """
    lens = [n for n in _SHORT_DOCS if n <= max_seq_len]
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    originals = [r.get("original_max_position_embeddings") for r in nested]
    originals += [getattr(config, name, None) for name in ("original_max_position_embeddings", "sliding_window")]
    if any(r.get("rope_type") == "dynamic" for r in nested):
        originals.append(getattr(config, "max_position_embeddings", None))
    for original in {n for n in originals if isinstance(n, int)}:
        room = min(max_seq_len, micro_batch_tokens - sum(lens))
        if original + 9 <= room:
            lens.append(original + 9)
    return lens


@torch.no_grad()
def measure_difference(model: nn.Module, own: str, doc_lens: list[int]) -> tuple[float, float]:
    """Largest |packed - solo| over the final hidden states, and their largest magnitude.

    Hidden states rather than logits: equal ones give equal logits, and a vocabulary's width is spared.
    """
    was_training = model.training
    model.eval()
    decoder = model.get_decoder()
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    vocab = model.get_input_embeddings().num_embeddings
    docs = [torch.randint(0, vocab, (1, n), generator=generator).to(device) for n in doc_lens]
    positions = torch.cat([torch.arange(n, device=device) for n in doc_lens])[None]
    packed = decoder(
        input_ids=torch.cat(docs, 1), position_ids=positions, use_cache=False, documents=Documents(doc_lens)
    ).last_hidden_state.split(doc_lens, 1)
    model.set_attn_implementation(own)
    difference = scale = 0.0
    for document, together in zip(docs, packed, strict=True):
        solo = decoder(input_ids=document, use_cache=False).last_hidden_state
        difference = max(difference, (solo - together).abs().max().item())
        scale = max(scale, solo.abs().max().item())
    model.set_attn_implementation(PACKED_ATTENTION)
    model.train(was_training)
    return difference, scale
