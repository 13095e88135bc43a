"""Products of activations with weights.

torch multiplies fp32 matrices on CPUs with Intel's MKL, which on AMD processors is slower than oneDNN, a part of torch
too: on a Zen 4 core 92 to 98 GFLOP/s against 106, and 69 against 98 for the narrow products of LoRA (torch 2.13).
"""

from __future__ import annotations

import functools
import platform
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., inputs] x [outputs, inputs] -> [..., outputs], as F.linear, without gradients of its own."""
    # torch.compile has products of its own, and what decides here breaks its graphs
    if not torch.compiler.is_compiling() and uses_onednn(x, weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of the two is for oneDNN."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Decided by the processor, not by a timing: a resumed run must choose as it did before."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and is_amd()):
        return False
    try:
        x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
        found = torch.ops.mkldnn._linear_pointwise(x, weight.t().contiguous().t(), bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):  # not in this version of torch
        return False
    return torch.allclose(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@functools.cache
def is_amd() -> bool:
    """Whether AMD made this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "AMD" in platform.processor()
    return any("AMD" in line for line in lines if line.startswith("vendor_id"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # for a frozen weight x is not needed
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if needs_x else None,
            rows.t().mm(x.flatten(0, -2)) if needs_weight else None,  # MKL is no slower here
            rows.sum(0) if needs_bias else None,
        )


def speed_up_linear(layer: Any) -> None:
    """Let an nn.Linear multiply with `linear` while it trains."""
    layer.forward = types.MethodType(_forward, layer)  # a method, so that a copy of the layer has its own weights


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.ndim > 1 and uses_onednn(x, layer.weight):
        found: Tensor = _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return found
    return F.linear(x, layer.weight, layer.bias)
