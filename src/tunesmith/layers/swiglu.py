"""SwiGLU (Shazeer 2020) with two tensors of its width kept for the backward, not four.

autograd keeps gate, up, silu(gate) and the product of the two, which the down projection needs for the gradient of its
weights. The latter two follow from the former at the cost of one pass over memory.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.layers.norm import bare_copy


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up, of one shape; rounds as autograd does in forward and backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return multiply(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        slope = grad * up
        torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=slope)
        return slope, F.silu(gate).mul_(grad)


def multiply(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


_watches: list[Callable[[Tensor], object]] = []


@contextmanager
def watching_kept(watch: Callable[[Tensor], object]) -> Iterator[None]:
    """Within the block, `watch` gets the tensors that down projections keep: saved_tensors_hooks around a model do not
    see them, since only the innermost hooks are called."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


class _Again:
    """In the place of a saved tensor: how to compute it."""

    def __init__(self, gate: Tensor, up: Tensor, shape: torch.Size) -> None:
        self._gate, self._up, self._shape = gate, up, shape

    def compute(self) -> Tensor:
        return multiply(self._gate, self._up).view(self._shape)


def speed_up_mlp(mlp: nn.Module) -> bool:
    """Let a module keep less, if it computes down(silu(gate(x)) * up(x)); returns whether it does."""
    if not _is_swiglu(mlp):
        return False
    mlp.forward = types.MethodType(_forward, mlp)
    return True


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if gate.dtype != up.dtype:
        plain: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
        return plain
    product = SwiGLUFunction.apply(gate, up)  # type: ignore[no-untyped-call]
    kept_gate, kept_up = gate.detach(), up.detach()
    place, size = product.untyped_storage().data_ptr(), product.numel()

    def keep(tensor: Tensor) -> Tensor | _Again:  # autograd keeps this function, which must not refer to product
        is_product = tensor.untyped_storage().data_ptr() == place and tensor.numel() == size
        if is_product and tensor.is_contiguous():
            return _Again(kept_gate, kept_up, tensor.shape)
        for watch in _watches:
            watch(tensor)
        return tensor if tensor.is_leaf else tensor.detach()  # which would keep the graph that keeps it

    def get(kept: Tensor | _Again) -> Tensor:
        return kept.compute() if isinstance(kept, _Again) else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, get):
        output: Tensor = mlp.down_proj(product)
    return output


def _is_swiglu(mlp: Any) -> bool:
    """Compare a copy of the module, with layers of its own, with what it should compute."""
    names = {"gate_proj", "up_proj", "down_proj"}
    if not names <= set(mlp._modules) or not set(mlp._modules) <= names | {"act_fn"} or mlp._parameters:
        return False
    generator = torch.Generator().manual_seed(1)
    clone = bare_copy(mlp)
    clone.training = True  # dropout
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            gate, up = (nn.Linear(4, 6, bias=False) for _ in range(2))
            layers = {"gate_proj": gate, "up_proj": up, "down_proj": nn.Linear(6, 4, bias=False)}
            clone._modules = {**mlp._modules, **layers}
            for layer in layers.values():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            x = torch.randn(3, 4, generator=generator)
            return all(_agree(clone(part), layers, part) for part in (x, 1e4 * x))  # some clamp large values
    except (RuntimeError, TypeError, ValueError, AttributeError):  # takes something else
        return False


def _agree(found: Tensor, layers: dict[str, nn.Linear], x: Tensor) -> bool:
    wanted = layers["down_proj"](multiply(layers["gate_proj"](x), layers["up_proj"](x)))
    return torch.allclose(found, wanted, rtol=1e-6, atol=1e-6 * max(1.0, float(wanted.abs().max())))
