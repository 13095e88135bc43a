"""A frozen linear layer with plain LoRA as one function, with fewer passes over memory than peft's.

peft adds up the layer and its low-rank product in separate tensors, scales one of them, and autograd does so again in
the backward. Here the low-rank products are accumulated where the large ones are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.layers.products import linear


class _LoraLinear(torch.autograd.Function):
    """x W' + bias + scaling * (dropped A') B', with gradients for x, dropped, A and B. All matrices of one dtype.

    `dropped` is x after dropout; None without dropout. The output is no view: models may change it in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        adapted = x if dropped is None else dropped
        low = linear(adapted, a)
        ctx.save_for_backward(adapted, weight, a, b, low)
        ctx.scaling, ctx.has_dropout = scaling, dropped is not None
        return linear(x, weight, bias).addmm_(low, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        adapted, weight, a, b, low = ctx.saved_tensors
        needs_x, needs_dropped, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        low_grad = linear(grad, b.t()).mul_(ctx.scaling)
        x_grad = dropped_grad = a_grad = b_grad = None
        if needs_x:
            x_grad = linear(grad, weight.t())
            if not ctx.has_dropout:
                x_grad.addmm_(low_grad, a)
        if needs_dropped:
            dropped_grad = linear(low_grad, a.t())
        if needs_a:
            a_grad = low_grad.t().mm(adapted)
        if needs_b:
            b_grad = grad.t().mm(low).mul_(ctx.scaling)
        return x_grad, dropped_grad, None, None, a_grad, b_grad, None


def fuse_lora(model: nn.Module) -> int:
    """Let the plain LoRA layers of a model compute in one function while they train; returns their number.

    Left to peft: DoRA and other variants, quantized layers, experts, embeddings, trained biases; a layer whose parts
    have hooks; and all layers where this version of peft computes something else.
    """
    from peft.tuners.lora.layer import Linear

    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    if not layers or not _agrees_with_peft():
        return 0
    for layer in layers:
        _fuse(layer)
    return len(layers)


def _fuse(layer: Any) -> None:
    """Replace the forward of one layer; the layer remains peft's in everything else."""
    layer.forward = types.MethodType(_forward, layer)  # a method, so that a copy of the layer computes with its own


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    (name, *others) = layer.lora_A
    if torch.is_grad_enabled() and x.ndim > 1 and not (others or args or kwargs) and _is_active(layer, name):
        base, a, b, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if dtype := _common_dtype(x, base.weight, a.weight, b.weight):
            dropped = dropout(x) if dropout.training and type(dropout) is nn.Dropout else None
            rows, dropped_rows = (None if tensor is None else tensor.flatten(0, -2) for tensor in (x, dropped))
            tensors = (rows, dropped_rows, base.weight, base.bias, a.weight, b.weight)
            cast = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
            rows = _LoraLinear.apply(*cast, layer.scaling[name])  # type: ignore[no-untyped-call]
            fused: Tensor = rows.unflatten(0, x.shape[:-1])
            return fused
    output: Tensor = type(layer).forward(layer, x, *args, **kwargs)
    return output


def _is_plain(layer: Any) -> bool:
    names = list(layer.lora_A)
    if len(names) != 1 or layer.lora_variant or layer.fan_in_fan_out or type(layer.base_layer) is not nn.Linear:
        return False
    a, b, dropout = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    is_frozen = not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    return (
        is_frozen
        and type(a) is type(b) is nn.Linear
        and a.bias is None
        and b.bias is None
        and type(dropout) in (nn.Identity, nn.Dropout)
    )


def _is_active(layer: Any, name: str) -> bool:
    """Whether peft would add this adapter's product, and the parts do nothing but multiply when called: DeepSpeed
    gathers weights in hooks."""
    if layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
        return False
    parts = (layer.base_layer, layer.lora_A[name], layer.lora_B[name])
    return not any(part._forward_pre_hooks or part._forward_hooks for part in parts)


def _common_dtype(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> torch.dtype | None:
    """autocast's dtype, or the one that all have; None where peft has to convert them."""
    tensors, device = (x, weight, a, b), x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return dtype if all(tensor.dtype in (torch.float32, dtype) for tensor in tensors) else None
    return x.dtype if all(tensor.dtype == x.dtype for tensor in tensors) else None


@functools.cache
def _agrees_with_peft() -> bool:
    """Compare output and gradients of a small layer in float64."""
    from peft import LoraConfig, inject_adapter_in_model

    state = torch.get_rng_state()
    try:
        holder = nn.Sequential(nn.Linear(5, 7)).double().requires_grad_(False)
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
        layer: Any = inject_adapter_in_model(config, holder).double().get_submodule("0")
        x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        wanted = _results(layer, x)
        _fuse(layer)
        found = _results(layer, x)
    finally:
        torch.set_rng_state(state)
    return all(torch.allclose(mine, theirs, rtol=0, atol=1e-12) for mine, theirs in zip(found, wanted, strict=True))


def _results(layer: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        output = layer(x)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *trained])]
