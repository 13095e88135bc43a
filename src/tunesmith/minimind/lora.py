"""MiniMind's LoRA files, in and out: two matrices beside each square linear layer, added without a scale."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.minimind.names import rename_old, rename_to_old, to_halves, to_pairs, turn_heads
from tunesmith.minimind.read import lora_names

_MATRIX = re.compile(r"(?P<module>.+)\.lora\.(?P<matrix>[AB])\.weight")
_OLD_ROOT = re.compile(r"layers\.")


def read_lora(path: Path, state: Mapping[str, Tensor], heads: int, kv_heads: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Module, by transformers' name -> (A [rank, in], B [out, rank]).

    Args:
        state: tensors of the file.
        heads, kv_heads: of the base, for files of the 2024 form.

    Raises:
        ModelError: the file has other tensors, or one matrix of a pair.
    """
    if set(lora_names(state)) != set(state):
        other = min(set(state) - set(lora_names(state)))
        raise ModelError(
            f"{path}: {other} is no LoRA matrix; a LoRA file of MiniMind has names such as "
            "model.layers.0.self_attn.q_proj.lora.A.weight only.",
            code="pth-not-lora",
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _MATRIX.fullmatch(name)
        if not found or tensor.ndim != 2 or not tensor.numel():
            raise ModelError(
                f"{path}: {name} is no matrix of MiniMind's LoRA. Save it there again.", code="pth-not-lora"
            )
        if not tensor.isfinite().all():
            raise ModelError(f"{path}: {name} has NaN or infinite values; its training failed.", code="pth-not-finite")
        pairs.setdefault(found["module"], {})[found["matrix"]] = tensor.float()
    turned = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ModelError(
                f"{path}: {module} has no pair of matrices [rank, in] and [out, rank]. Save it there again.",
                code="pth-not-lora",
            )
        name, b = module, pair["B"]
        if _OLD_ROOT.match(module):
            name = rename_old(module)
            if turn_heads(f"{name}."):
                count = heads if name.endswith("q_proj") else kv_heads
                if len(b) % (2 * count):
                    raise ModelError(
                        f"{path}: {module} has {len(b)} rows, which {count} heads do not divide into pairs. Give the "
                        "base that it was trained on.",
                        code="adapter-does-not-fit",
                    )
                b = to_halves(b, count)
        turned[name] = (pair["A"], b)
    return turned


def require_modules(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], model: nn.Module) -> None:
    """Raises:
    ModelError: the base has no such layer, or one of another shape.
    """
    modules = dict(model.named_modules())
    for name, (a, b) in pairs.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            found = "has no such layer" if weight is None else f"has {list(weight.shape)} there"
            raise ModelError(
                f"{path}: {name} is {[b.shape[0], a.shape[1]]}; the base {found}. Give the base that it was "
                "trained on.",
                code="adapter-does-not-fit",
            )


def square_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that MiniMind's apply_lora takes, in its order."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features == module.out_features:
            yield name, module


def lora_state(
    name: str, model: nn.Module, deltas: Mapping[str, tuple[Tensor, Tensor]], generation: str
) -> tuple[dict[str, Tensor], int]:
    """The tensors of a LoRA file in half precision, and its rank; layers without a change get zeros.

    Args:
        deltas: module, by transformers' name -> (A, B), scaled.

    Raises:
        ModelError: the adapter changes layers that MiniMind's LoRA has not, or half precision cannot hold it.
    """
    config: Any = model.config
    square = dict(square_layers(model))
    if others := sorted(set(deltas) - set(square)):
        raise ModelError(
            f"{name}: changes {others[0]}; MiniMind's LoRA has square layers only ("
            f"{', '.join(sorted({key.rpartition('.')[2] for key in square}))}). Merge the adapter and export the "
            "model: --format minimind.",
            code="lora-does-not-fit",
        )
    rank = max(a.shape[0] for a, _ in deltas.values())
    found: dict[str, Tensor] = {}
    for module, layer in square.items():
        a, b = deltas.get(module) or (torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
        a = nn.functional.pad(a.cpu().float(), (0, 0, 0, rank - a.shape[0]))
        b = nn.functional.pad(b.cpu().float(), (0, rank - b.shape[1]))
        written = module
        if generation == "2024":
            if turn_heads(f"{module}."):
                b = to_pairs(b, config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads)
            written = rename_to_old(module)
        for matrix, tensor in (("A", a), ("B", b)):
            half = found[f"{written}.lora.{matrix}.weight"] = tensor.to(torch.float16).contiguous()
            if not half.isfinite().all():
                raise ModelError(f"{name}: {module} is too large for half precision.", code="too-large-for-half")
    return found, rank
