"""Resolve train.precision on a device: dtypes of weights and autocast, and whether losses are scaled."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from tunesmith.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of a run.

    Attributes:
        name: the resolved train.precision.
        weights: dtype of parameters, gradients and optimizer state.
        autocast: dtype of matrix products; None without autocast.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=self.autocast) if self.autocast else nullcontext()

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """A GradScaler; fp16 gradients would underflow without it, for other dtypes it does nothing."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "fp16")


def choose_precision(name: str, device: torch.device) -> Precision:
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision", ["fp16 needs a GPU; use fp32 or bf16 on a CPU"], code="precision-needs-gpu"
        )
    if name == "bf16_pure":
        return Precision(name, torch.bfloat16, None)
    return Precision(name, torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name))


def make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS for deterministic results
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
