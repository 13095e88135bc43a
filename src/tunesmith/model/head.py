"""The head of a language model: hidden states to logits, at supervised positions only."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.pack import Documents
from tunesmith.model.head_loss import LogitRule
from tunesmith.model.probe import in_fp32


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[targets, hidden] -> [targets, vocab], including what the model's forward does to its logits."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden)
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def logit_rule(model: PreTrainedModel) -> LogitRule:
    """The same, for `head_loss`."""
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if divisor is not None:
        factor = (1.0 if factor is None else factor) / divisor
    return LogitRule(factor, getattr(config, "final_logit_softcapping", None))


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head, if calling it is nothing but a product with its weights: not quantized, no adapter, no hooks (DeepSpeed
    gathers weights in such)."""
    head = model.get_output_embeddings()
    is_plain = type(head) is nn.Linear and not head._forward_pre_hooks and not head._forward_hooks
    return head if is_plain else None


def choose_head_path(model: PreTrainedModel, is_packed: bool) -> str:
    """How to compute logits: "decoder" where decoder and head_logits give the model's own logits, else the cheapest
    option through its forward.

    Compared on a document of eight tokens: a model may scale, cap or bias its logits in ways that we do not know.

    Args:
        model: from probe_model.
        is_packed: whether its attention takes `documents`.
    """
    device = next(model.parameters()).device
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, 8), generator=torch.Generator().manual_seed(1)).to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if is_packed:
        inputs |= {"position_ids": torch.arange(8, device=device)[None], "documents": Documents([8])}
    with in_fp32(model):
        reference = model(**inputs).logits[0]
        try:
            ours = head_logits(model, model.get_decoder()(**inputs).last_hidden_state[0])
            if ours.shape == reference.shape and torch.allclose(ours, reference, rtol=1e-4, atol=1e-5):
                return "decoder"
        except (AttributeError, TypeError):  # no decoder with the usual interface
            pass
    return "logits_to_keep" if "logits_to_keep" in inspect.signature(type(model).forward).parameters else "logits"
