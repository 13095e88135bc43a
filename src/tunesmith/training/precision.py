"""Resolve train.precision on a device: dtypes of weights and products, and whether losses are scaled."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.errors import ConfigError
from tunesmith.layers.products import is_amd


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of a run.

    Attributes:
        name: the resolved train.precision.
        weights: dtype of parameters, gradients and optimizer state.
        compute: dtype of matrix products, where it is not the weights'.
        has_copies: whether that is had by copies of the weights (layers/copies.py), not by autocast.
    """

    name: str
    weights: torch.dtype
    compute: torch.dtype | None
    has_copies: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        """None without autocast."""
        return None if self.has_copies else self.compute

    @property
    def copies(self) -> torch.dtype | None:
        """None without copies of the weights."""
        return self.compute if self.has_copies else None

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=self.autocast) if self.autocast else nullcontext()

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """A GradScaler; fp16 gradients would underflow without it, for other dtypes it does nothing."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "fp16")


def resolve_precision(name: str, device: torch.device) -> str:
    """train.precision, with bf16 or fp32 in place of auto: bf16 where the device multiplies it faster."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if device.type == "cpu" and has_fast_bf16() else "fp32"


def keep_precision(name: str, recorded: str | None, device: torch.device) -> str:
    """train.precision of a run that has begun, perhaps on another machine.

    Args:
        recorded: what auto meant at its start; None in runs of earlier versions, for which a CPU had fp32.
    """
    if name == "auto" and recorded is None and device.type == "cpu":
        return "fp32"
    return resolve_precision((recorded or name) if name == "auto" else name, device)


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32, and oneDNN may use the instructions for it.

    AMX does, and AVX512_BF16 of AMD: a step of a 26M model takes 0.68 of fp32's time on a Zen 4. On an Intel Xeon
    without AMX, AVX512_BF16 has half the rate of fp32 (146 GFLOP/s against 304 on two cores), and a step takes 1.5
    times as long. Decided by the processor, not by a timing, so that two runs on one machine are the same.
    """
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    has_amx = limit in ("ALL", "DEFAULT") or "AMX" in limit or "AVX10" in limit
    found = _cpu_capabilities()
    if has_amx and found["amx_bf16"]:
        return True
    return (has_amx or "BF16" in limit or "FP16" in limit) and found["avx512_bf16"] and is_amd()


def _cpu_capabilities() -> dict[str, bool]:
    names = ("amx_bf16", "avx512_bf16")
    if hasattr(torch.cpu, "get_capabilities"):
        found: Any = torch.cpu.get_capabilities()
        return {name: bool(found.get(name)) for name in names}
    amx, avx512 = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("amx_tile", "avx512_bf16"))
    return dict(zip(names, (amx(), avx512()), strict=True))


def choose_precision(name: str, device: torch.device, can_copy: bool = False) -> Precision:
    """Args:
    can_copy: whether bf16 may be had by copies of the weights.
    """
    name = resolve_precision(name, device)
    if name == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision", ["fp16 needs a GPU; use fp32 or bf16 on a CPU"], code="precision-needs-gpu"
        )
    if name == "bf16_pure":
        return Precision(name, torch.bfloat16, None)
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    return Precision(name, torch.float32, compute, has_copies=can_copy and name == "bf16")


def make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS for deterministic results
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
