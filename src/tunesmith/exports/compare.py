"""Compare an exported model with the one that it was written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.open_adapter import TOLERANCE
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import RunError
from tunesmith.use.proof import PROMPTS, logits_of


@torch.no_grad()
def add_products(model: Any, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """The model with the products added to its weights."""
    for name, (a, b) in pairs.items():
        weight: Any = model.get_submodule(name).weight
        weight += b @ a
    return model


def prompt_logits(model: nn.Module, encoder: Encoder) -> Tensor:
    prompts: Sequence[Tensor] = [torch.tensor(encoder.tokenizer(text)["input_ids"]) for text in PROMPTS]
    return logits_of(model, [ids for ids in prompts if len(ids)])


def difference_of(wanted: Tensor, found: Tensor) -> float:
    largest = wanted.abs().max().item()
    return (wanted - found).abs().max().item() / (largest or 1.0)


def compare_models(wanted: nn.Module, found: nn.Module, encoder: Encoder) -> str:
    """Compare logits in fp32; returns a description.

    Raises:
        RunError: they differ by more than rounding explains.
    """
    difference = difference_of(prompt_logits(wanted, encoder), prompt_logits(found, encoder))
    allowed = TOLERANCE[torch.float32]
    if not difference <= allowed:
        raise logits_differ(difference, allowed)
    prompts = f"logits on {len(PROMPTS)} prompts"
    return f"read back; {prompts} differ by {difference:.1e} of the largest (allowed: {allowed:.0e})"


def logits_differ(difference: float, allowed: float) -> RunError:
    return RunError(
        f"the exported files' logits differ by {difference:.1e} of the largest logit, more than {allowed:.0e}. No "
        "files were kept.",
        code="exported-logits-differ",
    )
