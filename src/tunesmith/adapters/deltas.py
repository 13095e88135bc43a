"""Compute the change of each base weight by a LoRA adapter, tensor by tensor, without building the model.

W' = W + (alpha / rank) B A (Hu et al. 2021); rsLoRA: alpha / sqrt(rank) (Kalajdzievski 2023); DoRA: each output row of
that sum rescaled to a learned norm (Liu et al. 2024). Computed in fp32 (fp64 for fp64 weights) and rounded once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters.adapter_config import ADAPTER_CONFIG, PatternError, read_adapter_config, resolve_pattern
from tunesmith.adapters.open_adapter import read_adapter_weights
from tunesmith.adapters.stored_base import PREFIX, ROWS, fit_stored, split_weights
from tunesmith.errors import ModelError

_PART = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")


class Delta:
    """An adapter as changes of named tensors.

    Attributes:
        folder: the PEFT folder.
        stored: base weights contained in the adapter's file; applied first.
        whole: tensors that replace the base's (modules_to_save, trained biases).
        rows: tensor name -> (row numbers, rows [n, width]) of added tokens.
        parts: tensor name -> {"lora_A": [rank, in], "lora_B": [out, rank], "lora_magnitude_vector": [out]}; for an
            embedding {"lora_embedding_A": [rank, rows], "lora_embedding_B": [width, rank]}.

    Raises:
        ModelError: the adapter is damaged, or changes weights in a way that is not supported here.
    """

    def __init__(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        self.folder, self._config = folder, read_adapter_config(folder)
        self.whole: dict[str, Tensor] = {}
        self.rows: dict[str, tuple[list[int], Tensor]] = {}
        self.parts: dict[str, dict[str, Tensor]] = {}
        read = weights if weights is not None else read_adapter_weights(folder)
        self._split = split_weights(self._config, read)
        self.stored = self._split.stored
        for key, tensor in self._split.own.items():
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if name.endswith(ROWS):
                module = name.removesuffix(ROWS)
                self.rows[f"{module}.weight"] = self._row_numbers(module), tensor
            elif found := _PART.search(name):
                self.parts.setdefault(f"{name[: found.start()]}.weight", {})[found[1]] = tensor
            else:
                self.whole[name] = tensor
        try:
            self._alphas = resolve_pattern(
                self._config.alpha_pattern, [name.removesuffix(".weight") for name in self.parts]
            )
        except PatternError as error:
            raise ModelError(f"{folder / ADAPTER_CONFIG}: {error}.", code="bad-pattern") from None

    @property
    def has_experts(self) -> bool:
        """Whether the adapter changes weights that are not modules (fused experts)."""
        return bool(self._config.target_parameters)

    def changes(self, name: str) -> bool:
        """Whether the adapter trained this tensor; base weights stored in its file do not count."""
        return name in self.parts or name in self.whole or name in self.rows

    def ties_head(self, embedding: str) -> bool:
        """Whether a tied head changes with the embedding."""
        return embedding in self.rows or (embedding in self.whole and self._config.ensure_weight_tying)

    def fit(self, embedding: str, head: str, is_tied: bool, rows: int) -> None:
        """Names of stored embedding and head weights in the base; one weight may count for both.

        Raises:
            ModelError: the stored weights do not fit the base.
        """
        ends = embedding.removesuffix(".weight"), head.removesuffix(".weight")
        self.stored = fit_stored(self._split, self.folder, *ends, is_tied, rows)

    def names(self) -> Iterator[str]:
        yield from self.stored
        yield from self.parts
        yield from self.whole
        yield from self.rows

    def apply(self, name: str, base: Tensor, is_transposed: bool = False) -> Tensor:
        """The tensor with the adapter merged, in the tensor's dtype.

        Args:
            is_transposed: the weight is [in, out], as in GPT-2's Conv1D.

        Raises:
            ModelError: the shapes do not fit.
        """
        if name in self.stored:
            stored = self.stored[name]
            is_resized = base.ndim == 2 and stored.ndim == 2 and stored.shape[1] == base.shape[1]
            base = (stored if is_resized else self._fit(name, stored, base)).to(base.dtype)
        if name in self.rows:
            numbers, rows = self.rows[name]
            grown = base.new_zeros(max(len(base), max(numbers) + 1), base.shape[1])
            grown[: len(base)] = base
            grown[numbers] = rows.to(base.dtype)
            return grown
        if name in self.whole:
            whole = self.whole[name]
            is_grown = base.ndim == 2 and whole.ndim == 2 and len(whole) > len(base)  # with added tokens
            return (whole if is_grown else self._fit(name, whole, base)).to(base.dtype)
        if name not in self.parts:
            return base
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        parts = {part: tensor.to(wide) for part, tensor in self.parts[name].items()}
        if "lora_embedding_A" in parts:
            delta = (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T
        else:
            delta = parts["lora_B"] @ parts["lora_A"]
        delta = self._scaling(name, parts) * (delta.T if is_transposed else delta)
        changed = base.to(wide) + self._fit(name, delta, base)
        if (magnitude := parts.get("lora_magnitude_vector")) is not None:
            rows = changed.T if is_transposed else changed
            rows = rows * (magnitude / rows.norm(dim=1)).unsqueeze(1)
            changed = rows.T if is_transposed else rows
        return changed.to(base.dtype).contiguous()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [rank, in], B [out, rank]) of a plain LoRA's tensor; the change is B A."""
        parts = self.parts[name]
        return parts["lora_A"].float(), self._scaling(name, parts) * parts["lora_B"].float()

    def _row_numbers(self, module: str) -> list[int]:
        return list(self._config.token_indices(module))

    def _scaling(self, name: str, parts: Mapping[str, Tensor]) -> float:
        """Scale of a module; alpha (alpha_pattern) and rank (from the shapes) may differ between modules."""
        rank = len(parts["lora_A"] if "lora_A" in parts else parts["lora_embedding_A"])
        alpha = self._alphas.get(name.removesuffix(".weight"), self._config.lora_alpha)
        return float(alpha / math.sqrt(rank) if self._config.use_rslora else alpha / rank)

    def _fit(self, name: str, tensor: Tensor, base: Tensor) -> Tensor:
        if tensor.shape != base.shape:
            raise ModelError(
                f"{self.folder}: does not fit this base: {name} is {list(base.shape)} in the base, but "
                f"{list(tensor.shape)} in the adapter.",
                code="adapter-does-not-fit",
            )
        return tensor
