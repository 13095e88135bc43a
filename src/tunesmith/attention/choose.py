"""Choose the kernel of each kind of layer; one that differs from the loop on the model at hand is not used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.attention.kernels import KERNELS
from tunesmith.attention.layout import AttentionPlan, Consecutive, LayerKind, PackedLayout, make_layout
from tunesmith.attention.loop import LayerOptions, attend_documents
from tunesmith.attention.trees import attend_trees
from tunesmith.plans.tree import Tree

# A kernel may err this many times as much as the loop does in the same dtype, both against float64, and a little where
# the loop is exact. What a document sees of another one errs by its whole values.
_TIMES, _LITTLE = 4.0, 1e-5
Attend = Callable[[Tensor, Tensor, Tensor, LayerOptions], Tensor]


def kind_of(query: Tensor, options: LayerOptions) -> LayerKind:
    return options.window, options.softcap is not None, options.sinks is not None, query.shape[-1], query.dtype


@dataclass
class Recorder:
    """Compares kernels while a model makes a forward; a `PackedLayout` carries it to the layers.

    Attributes:
        candidates: names of KERNELS in order of preference.
        needs_all: compare the others too when one is found, since prefix trees need FlexAttention.
        kernels: the result, by kind of layer.
        refused: of a kernel, for which layers it is not used, and why.
    """

    candidates: Sequence[str] = tuple(KERNELS)
    needs_all: bool = False
    kernels: dict[LayerKind, tuple[str, ...]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def compare(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: LayerOptions) -> None:
        """Of the first layer of each kind."""
        options = replace(options, dropout=0.0)
        kind = kind_of(query, options)
        if kind in self.kernels:
            return
        inputs = [tensor.detach() for tensor in (query, key, value)]
        used: list[str] = []
        for name in self.candidates:
            if not KERNELS[name][0](query, options) or (used and not self.needs_all):
                continue
            if reason := self._try(name, kind, inputs, layout.source, options):
                self.refused.append(f"{name} is not used for {_describe(kind)}: {reason}")
            else:
                used.append(name)
        self.kernels[kind] = tuple(used)

    def _try(
        self, name: str, kind: LayerKind, inputs: Sequence[Tensor], source: Consecutive, options: LayerOptions
    ) -> str:
        """What is wrong with the kernel for these inputs, or nothing."""
        attend, plan = KERNELS[name][1], AttentionPlan({kind: (name,)})
        sources = [source, branching(source.lens)] if self.needs_all and name == "flex" else [source]
        try:
            for one in sources:
                kernel = partial(_call, attend, make_layout(one, inputs[0].device, plan))
                if difference := find_difference(inputs, options, one, kernel):
                    return f"{difference} on prefix trees" if one is not source else difference
            return ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel that this GPU or shape does not have, in torch's own words
            return (str(error).splitlines() or [type(error).__name__])[0][:160]

    def plan(self) -> AttentionPlan:
        return AttentionPlan(dict(self.kernels))


def _call(
    attend: Callable[..., Tensor], layout: PackedLayout, q: Tensor, k: Tensor, v: Tensor, own: LayerOptions
) -> Tensor:
    return attend(q, k, v, layout, own)


def branching(lens: list[int]) -> Tree:
    """One prefix tree of strands of these lengths: of the second and later ones, every other one continues the first,
    and those between continue the one before them."""
    starts = np.cumsum([0, *lens]).tolist()
    anchors, ends = [-1], [lens[0]]
    for strand in range(1, len(lens)):
        parent = 0 if strand % 2 else strand - 1
        # what comes later continues an earlier token of the first strand: so the tokens lie in preorder
        kept = lens[0] * (len(lens) - strand) // len(lens) if parent == 0 else (lens[parent] + 1) // 2
        kept = max(1, kept)
        anchors.append(starts[parent] + kept - 1)
        ends.append(ends[parent] - lens[parent] + kept + lens[strand])
    return Tree(list(lens), anchors, np.zeros(0, np.int64), ends)


def find_difference(inputs: Sequence[Tensor], options: LayerOptions, source: Consecutive, attend: Attend) -> str:
    """Compare outputs and gradients with those of the loop; returns what differs, or nothing."""

    def loop(q: Tensor, k: Tensor, v: Tensor, own: LayerOptions) -> Tensor:
        if isinstance(source, Tree):
            return attend_trees(q, k, v, source, own)
        return attend_documents(q, k, v, source.lens, own)

    exact_dtype = torch.float32 if inputs[0].device.type == "mps" else torch.float64
    generator = torch.Generator(inputs[0].device).manual_seed(0)
    shape = (*inputs[0].shape[:3], inputs[2].shape[3])  # values may be narrower than keys (MLA)
    grad = torch.randn(shape, generator=generator, device=inputs[0].device).to(inputs[0].dtype)
    exact = _results(loop, inputs, options, grad, exact_dtype)
    usual = _results(loop, inputs, options, grad, inputs[0].dtype)
    found = _results(attend, inputs, options, grad, inputs[0].dtype)
    for name, best, one, other in zip(("output", "query's gradient", "key's gradient", "value's gradient",
                                       "sinks' gradient"), exact, usual, found, strict=False):  # fmt: skip
        scale = float(best.abs().max()) or 1.0
        own, allowed = _error(one, best) / scale, _error(other, best) / scale
        if not allowed <= _TIMES * own + _LITTLE:
            return f"its {name} errs by {allowed:.1e}, the reference in the same precision by {own:.1e}"
    return ""


def _results(
    attend: Attend, inputs: Sequence[Tensor], options: LayerOptions, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The output and the gradients, in float64 or what the device has."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    if options.sinks is not None:
        options = replace(options, sinks=options.sinks.detach().to(dtype).requires_grad_())
        leaves.append(_sinks(options))
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        output = attend(leaves[0], leaves[1], leaves[2], options)
        grads = torch.autograd.grad(output, leaves, grad.to(dtype))
    return [output.detach(), *grads]


def _sinks(options: LayerOptions) -> Tensor:
    assert options.sinks is not None
    return options.sinks


def _error(one: Tensor, best: Tensor) -> float:
    return float((one.to(best.dtype) - best).abs().max())


def _describe(kind: LayerKind) -> str:
    window, has_softcap, has_sinks, head_dim, dtype = kind
    extras: list[Any] = [f"a window of {window}"] if window else []
    extras += ["softcap"] if has_softcap else []
    extras += ["sinks"] if has_sinks else []
    return f"layers in {str(dtype).removeprefix('torch.')} with head_dim {head_dim}" + "".join(
        f", {extra}" for extra in extras
    )
