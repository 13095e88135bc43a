"""Test at start that documents of a pack do not see each other in this model.

The attention is ours, but a model may mix documents elsewhere: convolutions and state-space layers run across document
borders, and rope that depends on the longest position of a pack (longrope, dynamic NTK) changes for all its documents.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.attention.choose import Recorder
from tunesmith.attention.layout import PackedLayout
from tunesmith.data.pack import Documents
from tunesmith.errors import ModelError
from tunesmith.model.attention import PACKED_ATTENTION, register_packed_attention
from tunesmith.model.probe import in_fp32
from tunesmith.plans.tree import build_tree

_SHORT_DOCS = [7, 33, 5, 20]
# Allowed difference relative to the channel's largest value. Measured in fp32 even where training uses less: rounding
# errors are near 1e-6 there, while in bf16 they could hide a leak.
_TOLERANCE = 5e-5


@dataclass(frozen=True, slots=True)
class Isolation:
    """Whether packs are safe, and a description of the measurement."""

    is_isolated: bool
    report: str


@dataclass(frozen=True, slots=True)
class TreeCheck:
    """Whether prefix trees give what their samples give one by one, and a description of the measurement."""

    is_exact: bool
    report: str


def use_packed_attention(model: PreTrainedModel) -> None:
    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)


def probe_isolation(model: PreTrainedModel, max_seq_len: int, micro_batch_tokens: int) -> Isolation:
    """Compare packed attention with the model's own attention on single documents; the model is left unchanged.

    Args:
        model: from probe_model.

    Raises:
        ModelError: a token's hidden state depends on later tokens, so next-token training is useless.
    """
    own = model.config._attn_implementation
    doc_lens = choose_doc_lens(model.config.get_text_config(), max_seq_len, micro_batch_tokens)
    with in_fp32(model):
        if sees_later_tokens(model):
            raise ModelError(
                f"{type(model).__name__} attends to later tokens (it is not causal, or not configured as one), so it "
                "would see the tokens that it is trained to predict. Use a causal language model.",
                code="not-causal",
            )
        try:
            use_packed_attention(model)
            difference = measure_difference(model, own, doc_lens)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models may fail in any way with an unknown attention function
            return Isolation(False, f"one document per forward: packing fails on this model ({_first_line(error)})")
        finally:
            model.set_attn_implementation(own)
    seen = f"packed and solo differ by {difference:.1e} (documents of {', '.join(map(str, doc_lens))} tokens)"
    if difference <= _TOLERANCE:
        return Isolation(True, f"packed: {seen}")
    return Isolation(False, f"one document per forward: {seen}, so this model mixes packed documents")


def choose_kernels(
    model: PreTrainedModel,
    context: AbstractContextManager[object],
    max_seq_len: int,
    micro_batch_tokens: int,
    has_trees: bool = False,
) -> Recorder:
    """Compare the kernels of a GPU with the loop over documents, in the precision of the run.

    Args:
        model: from probe_model, with packed attention.
        context: of a forward in training (autocast).
        has_trees: some batches are prefix trees.
    """
    doc_lens = choose_doc_lens(model.config.get_text_config(), max_seq_len, micro_batch_tokens)
    docs, recorder, was_training = _random_docs(model, doc_lens), Recorder(needs_all=has_trees), model.training
    layout = PackedLayout(Documents(doc_lens))
    layout.recorder = recorder
    positions = torch.cat([torch.arange(n, device=docs[0].device) for n in doc_lens])[None]
    model.eval()
    try:
        with torch.no_grad(), context:
            hidden_states(model, input_ids=torch.cat(docs, 1), position_ids=positions, documents=layout)
    finally:
        model.train(was_training)
    return recorder


def probe_trees(model: PreTrainedModel, own: str, max_seq_len: int, micro_batch_tokens: int) -> TreeCheck:
    """Compare prefix trees with the model's own attention on single samples; the model is left unchanged.

    Args:
        model: from probe_model, with packed attention.
        own: the name of its own attention.
    """
    doc_lens = choose_doc_lens(model.config.get_text_config(), max_seq_len, micro_batch_tokens)
    samples = [document[0] for document in _random_docs(model, doc_lens)]
    longest, other = max(samples, key=len), samples[0]
    for share in (0.9, 0.5, 0.5):  # branches of one another: early, late, and deep in a branch
        shared = int(share * len(longest))
        samples.append(torch.cat([longest[:shared], other[: max(1, len(longest) - shared)]]))
        other = samples[-1].flip(0)
    joined = build_tree([sample.cpu().numpy() for sample in samples], min_shared=1)
    device = samples[0].device
    inputs = {"input_ids": joined.input_ids, "position_ids": joined.position_ids}
    try:
        with in_fp32(model):
            model.set_attn_implementation(own)
            solo = [hidden_states(model, input_ids=sample[None])[0] for sample in samples]
            model.set_attn_implementation(PACKED_ATTENTION)
            tensors = {name: torch.from_numpy(ids)[None].to(device) for name, ids in inputs.items()}
            found = hidden_states(model, **tensors, documents=joined.layout)[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        return TreeCheck(False, f"prefix trees fail on this model ({_first_line(error)})")
    finally:
        model.set_attn_implementation(PACKED_ATTENTION)
    difference = _relative_difference(torch.cat(solo), found[torch.from_numpy(joined.layout.copies).to(device)])
    seen = f"prefix trees and single samples differ by {difference:.1e}"
    return TreeCheck(difference <= _TOLERANCE, seen)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def choose_doc_lens(config: Any, max_seq_len: int, micro_batch_tokens: int) -> list[int]:
    """Short documents, one longer than the sliding window, and one longer than the original context.

    A long document is included only if a training pack could hold it along with a short one.
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


def _random_docs(model: PreTrainedModel, lens: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    return [torch.randint(0, vocab, (1, n), generator=generator).to(device) for n in lens]


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Final hidden states [1, tokens, hidden]; equal ones give equal logits, without computing the whole vocabulary."""
    hidden: Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return hidden


def sees_later_tokens(model: PreTrainedModel) -> bool:
    """Whether changing the last token changes the hidden states before it."""
    (one,) = _random_docs(model, [12])
    two = one.clone()
    two[0, -1] = (two[0, -1] + 1) % model.config.get_text_config().vocab_size
    try:
        first, second = (hidden_states(model, input_ids=ids)[0, :-1] for ids in (one, two))
    except (AttributeError, TypeError):  # no decoder with the usual interface: compare logits instead
        first, second = (model(input_ids=ids).logits[0, :-1] for ids in (one, two))
    return _relative_difference(first, second) > _TOLERANCE


def measure_difference(model: PreTrainedModel, own: str, doc_lens: list[int]) -> float:
    """Largest |packed - solo| relative to the largest value of its channel."""
    docs = _random_docs(model, doc_lens)
    positions = torch.cat([torch.arange(n, device=docs[0].device) for n in doc_lens])[None]
    packed = hidden_states(model, input_ids=torch.cat(docs, 1), position_ids=positions, documents=Documents(doc_lens))
    model.set_attn_implementation(own)
    solo = torch.cat([hidden_states(model, input_ids=document) for document in docs], 1)
    model.set_attn_implementation(PACKED_ATTENTION)
    return _relative_difference(solo[0], packed[0])


def _relative_difference(one: Tensor, two: Tensor) -> float:
    """Of [tokens, channels] tensors, per channel: large values of one channel must not hide differences in others."""
    scale = one.abs().amax(0).clamp_min(1e-30)
    return float(((one - two).abs().amax(0) / scale).max())
