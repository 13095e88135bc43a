"""Verify a merge: compare base and adapter in peft with the merged model on disk.

The files were computed by our code (adapters/deltas.py), the reference by peft. Compared are the logits on real text
and all weights, since five prompts do not reach every expert and every row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.adapters.adapter_config import read_adapter_config
from tunesmith.adapters.base import weight_files
from tunesmith.adapters.open_adapter import TOLERANCE, merge_adapter, open_adapter
from tunesmith.errors import RunError
from tunesmith.model.load import check_vocabulary
from tunesmith.use.combine import MergePlan

PROMPTS = (
    "Who are you?",
    "Write a short poem about the sea.",
    "1, 2, 3, 4,",
    "def add(a, b):\n",
    "请介绍一下你自己。",
)


def prove(plan: MergePlan, combined: Sequence[Path], output: Path) -> str:
    """Compare the merged model with base and adapter; returns a description of the comparison.

    Args:
        combined: PEFT folders that, applied to the base one after another, have the same effect as the merge.

    Raises:
        RunError: they differ by more than rounding explains.
    """
    dtype = _dtype_of(output)
    size = sum(path.stat().st_size for path in weight_files(plan.base)) * (4 / dtype.itemsize)
    if 2.5 * size > available_memory():
        return "tensors compared; logits not compared, since the model does not fit into memory twice"
    model: Any = _load(plan.base, dtype, plan)
    for folder in combined[:-1]:
        model = merge_adapter(open_adapter(model, folder))
    wrapped = open_adapter(model, combined[-1])
    found: Any = _load(output, dtype, plan)
    prompts = encode_prompts(output, found, plan)
    wanted, merged = logits_of(wrapped, prompts), logits_of(found, prompts)
    difference = ((wanted - merged).abs().max() / wanted.abs().max()).item()
    if not difference <= TOLERANCE[dtype]:
        raise RunError(
            f"the merged model's logits differ from base and adapter by {difference:.1e} of the largest logit, more "
            f"than the {TOLERANCE[dtype]:.0e} that rounding to {str(dtype).removeprefix('torch.')} explains. No files "
            "were kept.",
            code="merged-logits-differ",
        )
    _compare_weights(merge_adapter(wrapped), found, TOLERANCE[dtype])
    same = (wanted.argmax(-1) == merged.argmax(-1)).float().mean().item()
    return (
        f"logits on {len(PROMPTS)} prompts differ by {difference:.1e} of the largest logit (allowed for "
        f"{str(dtype).removeprefix('torch.')}: {TOLERANCE[dtype]:.0e}); the most likely token agrees at {same:.1%}"
    )


def _load(folder: Path, dtype: torch.dtype, plan: MergePlan) -> nn.Module:
    """Load a model in fp32, or in its dtype if that is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=wide, trust_remote_code=plan.trust_remote_code
    )
    return model


def _compare_weights(wanted: nn.Module, found: nn.Module, tolerance: float) -> None:
    """Compare every weight of peft's merged model with that in the files."""
    there = found.state_dict()
    for name, tensor in wanted.state_dict().items():
        other = there.get(name)
        difference = float("inf")
        if other is not None and other.shape == tensor.shape:
            difference = (tensor.float() - other.float()).abs().max().item() if tensor.numel() else 0.0
        if not difference <= tolerance * max(tensor.float().abs().max().item() if tensor.numel() else 0.0, 1e-30):
            raise RunError(
                f"{name} of the merged files differs from peft's merge of base and adapter by {difference:.1e}. No "
                "files were kept.",
                code="merged-weights-differ",
            )


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Tensor]) -> Tensor:
    """Logits [all tokens, vocabulary] in fp32."""
    model.eval()
    return torch.cat([model(input_ids=ids[None]).logits[0].float() for ids in prompts])


def encode_prompts(folder: Path, model: Any, plan: MergePlan) -> list[Tensor]:
    """Prompts of real text if the model has a tokenizer, else its first ids; added tokens are in the first prompt."""
    rows = model.get_input_embeddings().num_embeddings
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=plan.trust_remote_code)
        check_vocabulary(model, tokenizer)
        prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPTS]
    else:
        prompts = [torch.arange(start, start + 16) % rows for start in range(0, 80, 16)]
    added = [n for adapter in plan.adapters for ids in read_adapter_config(adapter).all_token_indices() for n in ids]
    prompts[0] = torch.cat([prompts[0], torch.tensor(sorted(set(added))[:64], dtype=torch.int64)])
    return [ids for ids in prompts if len(ids)]


def _dtype_of(folder: Path) -> torch.dtype:
    with safe_open(weight_files(folder)[0], "pt") as file:
        dtypes = [file.get_tensor(key).dtype for key in list(file.keys())[:4]]
    return min((d for d in dtypes if d in TOLERANCE), key=lambda d: d.itemsize, default=torch.float32)


def available_memory() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return float("inf")
