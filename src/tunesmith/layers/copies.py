"""Copies of fp32 weights in half precision, to compute with (Micikevicius et al. 2018).

Autocast casts each weight in each forward, and each activation that an fp32 norm or sum has widened. With copies, which
are made once a step, every product, norm and sum between them is of half precision, and so is what a forward keeps.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HalfCopies:
    """Within `with copies:`, the model computes with copies of its fp32 weights; their gradients go to the weights.

    An embedding looks up its fp32 weights and casts what it found: a gradient summed in half precision over all
    occurrences of a frequent token would lose most of them. A weight that is tied to the head has a copy there alone.

    Args:
        dtype: bfloat16; float16 would need its loss scaled.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype, self._depth = dtype, 0
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        made: dict[int, nn.Parameter] = {}
        for module, name, weight in _weights_to_copy(model):
            if id(weight) not in made:
                made[id(weight)] = self._copy(weight)
            self._places.append((module, name, weight, made[id(weight)]))
        self._embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        self._hooks: list[RemovableHandle] = []

    def _copy(self, weight: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(weight.detach().to(self._dtype), requires_grad=weight.requires_grad)
        if weight.requires_grad:
            copy.register_post_accumulate_grad_hook(_Handing(weight))
        self._weights.append(weight)
        self._copies.append(copy)
        return copy

    def _cast(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(self._dtype) if output.dtype == torch.float32 else output

    @torch.no_grad()
    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        if self._copies:
            torch._foreach_copy_(self._copies, self._weights)
        for module, name, _, copy in self._places:
            module._parameters[name] = copy
        self._hooks = [module.register_forward_hook(self._cast) for module in self._embeddings]

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for module, name, weight, _ in self._places:
            module._parameters[name] = weight
        for hook in self._hooks:
            hook.remove()


class _Handing:
    """Adds a copy's gradient to that of its weight, in fp32."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weakref.ref(weight)  # the copy would else keep it alive

    def __call__(self, copy: Tensor) -> None:
        weight, grad = self._weight(), copy.grad
        copy.grad = None
        if weight is None or grad is None:
            return
        if weight.grad is None:
            weight.grad = grad.to(weight.dtype)
        else:
            weight.grad.add_(grad)


def _weights_to_copy(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The fp32 parameters outside embeddings, each with every module that has it, but for those that the model's class
    keeps in fp32."""
    names = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in names) or "$^")
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding):
            continue
        for name, weight in module._parameters.items():
            if weight is not None and weight.dtype == torch.float32 and not kept.search(f"{path}.{name}"):
                yield module, name, weight
