"""RMSNorm (Zhang and Sennrich 2019) as one function, which keeps its input and a number per vector for the backward.

transformers computes it in steps; autograd keeps the normed vectors as well, and walks through memory for each step.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNormFunction(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; the forward rounds as transformers' does.

    Vectors of half precision are normed in fp32 and rounded before they are multiplied with the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed = wide * scale if wide is x else wide.mul_(scale)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        size, dtype = x.shape[-1], x.dtype
        x, weight, grad = (tensor.to(scale.dtype) for tensor in (x, weight, grad))
        both = (grad * x).reshape(-1, size)
        weight_grad = both.t().mv(scale.reshape(-1)).to(dtype) if needs_weight else None
        if not needs_x:
            return None, weight_grad, None
        along = both.mv(weight).view_as(scale)  # of the gradient, the part along x
        x_grad = (x * (scale.pow(3).mul_(along).div_(-size))).addcmul_(grad * weight, scale)
        return x_grad.to(dtype), weight_grad, None


def speed_up_norm(norm: nn.Module) -> bool:
    """Let a module compute with RMSNormFunction, if that is what it computes; returns whether it is."""
    eps = _eps(norm)
    if eps is None or not _is_rms_norm(norm, eps):
        return False
    halves = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if _is_rms_norm(norm, eps, dtype))
    norm.forward = types.MethodType(functools.partial(_forward, dtypes=(torch.float32, *halves)), norm)
    return True


def _eps(norm: nn.Module) -> float | None:
    if not type(norm).__name__.endswith("RMSNorm") or list(norm._parameters) != ["weight"] or norm._modules:
        return None
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


def _is_rms_norm(norm: Any, eps: float, dtype: torch.dtype = torch.float32) -> bool:
    """Compare a copy of the module, with weights of its own, with the function; half precision bit by bit."""
    generator = torch.Generator().manual_seed(1)
    clone = bare_copy(norm)
    clone._parameters = {"weight": nn.Parameter(torch.randn(64, generator=generator).to(dtype))}
    x = (torch.randn(32, 64, generator=generator) * 1e-2).to(dtype)  # small, so that eps counts
    try:
        with torch.no_grad():
            wanted = clone(x)
            found = RMSNormFunction.apply(x, clone.weight, eps)  # type: ignore[no-untyped-call]
            return (
                torch.allclose(wanted, found, rtol=1e-6, atol=1e-7)
                if dtype == torch.float32
                else torch.equal(wanted, found)
            )
    except (RuntimeError, TypeError, ValueError, AttributeError):  # takes something else
        return False


def bare_copy(module: nn.Module) -> Any:
    """The module without its parameters and hooks."""
    clone = type(module).__new__(type(module))
    clone.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        clone.__dict__[name] = {}
    return clone


def _forward(norm: Any, x: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    if x.dtype == norm.weight.dtype and x.dtype in dtypes:
        found: Tensor = RMSNormFunction.apply(x, norm.weight, _eps(norm))  # type: ignore[no-untyped-call]
        return found
    plain: Tensor = type(norm).forward(norm, x)  # which may round half precision elsewhere
    return plain
