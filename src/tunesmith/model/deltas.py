"""What a LoRA adapter does to each weight of its base, tensor by tensor, without the model around them.

W' = W + (alpha / rank) B A (Hu et al. 2021); rsLoRA: alpha / sqrt(rank) (Kalajdzievski 2023); DoRA: each output row of
that sum brought to a learnt length (Liu et al. 2024). Sums are made in fp32,
for fp64 weights in fp64, and rounded once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.adapters import read_adapter_config, read_adapter_weights

_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_PART = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?$")


class Delta:
    """An adapter as changes of named tensors.

    Attributes:
        folder: the PEFT folder.
        whole: tensors that replace the base's (modules_to_save, trained biases).
        rows: tensor name -> (row numbers, rows [n, width]) of added tokens.
        parts: tensor name -> {"lora_A": [rank, in], "lora_B": [out, rank], "lora_magnitude_vector": [out]}.

    Raises:
        ModelError: the adapter is damaged, or changes weights in a way that has no rule here.
    """

    def __init__(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        self.folder, self._config = folder, read_adapter_config(folder)
        self.whole: dict[str, Tensor] = {}
        self.rows: dict[str, tuple[list[int], Tensor]] = {}
        self.parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in (weights if weights is not None else read_adapter_weights(folder)).items():
            name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
            if name.endswith(_ROWS):
                module = name.removesuffix(_ROWS)
                self.rows[f"{module}.weight"] = self._row_numbers(module), tensor
            elif found := _PART.search(name):
                self.parts.setdefault(f"{name[: found.start()]}.weight", {})[found[1]] = tensor
            else:
                self.whole[name] = tensor

    @property
    def has_experts(self) -> bool:
        """Whether it changes weights that are no module's own (a mixture's fused experts)."""
        return bool(self._config.get("target_parameters"))

    def names(self) -> Iterator[str]:
        yield from self.parts
        yield from self.whole
        yield from self.rows

    def apply(self, name: str, base: Tensor, is_transposed: bool = False) -> Tensor:
        """The tensor with the adapter in it, in its own dtype.

        Args:
            is_transposed: [in, out], as GPT-2's Conv1D keeps it.

        Raises:
            ModelError: the shapes do not fit.
        """
        if name in self.rows:
            numbers, rows = self.rows[name]
            grown = base.new_zeros(max(len(base), max(numbers) + 1), base.shape[1])
            grown[: len(base)] = base
            grown[numbers] = rows.to(base.dtype)
            return grown
        if name in self.whole:
            whole = self.whole[name]
            is_grown = base.ndim == 2 and whole.ndim == 2 and len(whole) > len(base)  # tokens were added
            return (whole if is_grown else self._fit(name, whole, base)).to(base.dtype)
        if name not in self.parts:
            return base
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        parts = {part: tensor.to(wide) for part, tensor in self.parts[name].items()}
        delta = self._scaling(name) * (parts["lora_B"] @ parts["lora_A"])
        delta = delta.T if is_transposed else delta
        changed = base.to(wide) + self._fit(name, delta, base)
        if (magnitude := parts.get("lora_magnitude_vector")) is not None:
            rows = changed.T if is_transposed else changed
            rows = rows * (magnitude / rows.norm(dim=1)).unsqueeze(1)
            changed = rows.T if is_transposed else rows
        return changed.to(base.dtype).contiguous()

    def _row_numbers(self, module: str) -> list[int]:
        indices = self._config["trainable_token_indices"]
        return list(indices[module.rpartition(".")[2]] if isinstance(indices, dict) else indices)

    def _scaling(self, name: str) -> float:
        """alpha and rank may differ from module to module (rank_pattern, alpha_pattern)."""
        module = name.removesuffix(".weight")
        rank = _by_pattern(self._config.get("rank_pattern"), module, self._config["r"])
        alpha = _by_pattern(self._config.get("alpha_pattern"), module, self._config["lora_alpha"])
        return float(alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank)

    def _fit(self, name: str, tensor: Tensor, base: Tensor) -> Tensor:
        if tensor.shape != base.shape:
            raise ModelError(
                f"{self.folder}: does not fit this base: {name} is {list(base.shape)} there, and the adapter was made "
                f"for {list(tensor.shape)}."
            )
        return tensor


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, usual: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual
