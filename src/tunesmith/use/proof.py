"""Verify a merge: compare base and adapter in peft with the merged model on disk.

Our own arithmetic (adapters/deltas.py) made the files; peft's makes the other side. Compared are the logits of real
text and, since five prompts reach neither every expert nor every row, all weights.
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

_PROMPTS = (
    "Who are you?",
    "Write a short poem about the sea.",
    "1, 2, 3, 4,",
    "def add(a, b):\n",
    "请介绍一下你自己。",
)


def prove(plan: MergePlan, combined: Sequence[Path], output: Path) -> str:
    """Compare; what was compared, in words.

    Args:
        combined: PEFT folders that do to the base, one after another, what was merged.

    Raises:
        RunError: the two differ by more than rounding explains.
    """
    dtype = _dtype_of(output)
    size = sum(path.stat().st_size for path in weight_files(plan.base)) * (4 / dtype.itemsize)
    if 2.5 * size > available_memory():
        return "too large for this memory, so its logits were not compared; its tensors were"
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
            f"the merged model's logits differ from base and adapter by {difference:.1e} of the largest, more than the "
            f"{TOLERANCE[dtype]:.0e} that rounding to {str(dtype).removeprefix('torch.')} explains. Nothing was kept.",
            code="merged-logits-differ",
        )
    _compare_weights(merge_adapter(wrapped), found, TOLERANCE[dtype])
    same = (wanted.argmax(-1) == merged.argmax(-1)).float().mean().item()
    return (
        f"logits on {len(_PROMPTS)} prompts differ by {difference:.1e} of the largest (allowed for "
        f"{str(dtype).removeprefix('torch.')}: {TOLERANCE[dtype]:.0e}); the likeliest token is the same at {same:.1%}"
    )


def _load(folder: Path, dtype: torch.dtype, plan: MergePlan) -> nn.Module:
    """In fp32, or what is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=wide, trust_remote_code=plan.trust_remote_code
    )
    return model


def _compare_weights(wanted: nn.Module, found: nn.Module, tolerance: float) -> None:
    """Every weight of the model that peft merged, with that of the files."""
    there = found.state_dict()
    for name, tensor in wanted.state_dict().items():
        other = there.get(name)
        difference = float("inf")
        if other is not None and other.shape == tensor.shape:
            difference = (tensor.float() - other.float()).abs().max().item() if tensor.numel() else 0.0
        if not difference <= tolerance * max(tensor.float().abs().max().item() if tensor.numel() else 0.0, 1e-30):
            raise RunError(
                f"{name} of the merged files is not what peft makes of base and adapter (differs by {difference:.1e}). "
                "Nothing was kept.",
                code="merged-weights-differ",
            )


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Tensor]) -> Tensor:
    """[all tokens, vocabulary], fp32."""
    model.eval()
    return torch.cat([model(input_ids=ids[None]).logits[0].float() for ids in prompts])


def encode_prompts(folder: Path, model: Any, plan: MergePlan) -> list[Tensor]:
    """Real text where the model has a tokenizer, else its first ids; the first has what an adapter added, too."""
    rows = model.get_input_embeddings().num_embeddings
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=plan.trust_remote_code)
        check_vocabulary(model, tokenizer)
        prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in _PROMPTS]
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
