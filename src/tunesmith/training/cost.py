"""A lower bound on the time of a run on a CPU, so that a plan for a GPU is recognised before step 1."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from tunesmith.display import format_bytes

_LONG_STEP = 30.0  # seconds: a laptop that shows no step for so long seems to hang
_LONG_RUN = 3 * 3600.0
_SLOWEST = 1e10  # FLOP/s that every CPU of today reaches: plans that are short on it are not measured
_MEASURED_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run asks of a machine.

    Attributes:
        step_flops: of one optimizer step, matrix products alone.
        steps: of the run.
        memory: bytes at the peak.
    """

    step_flops: float
    steps: int
    memory: float

    def is_cheap(self) -> bool:
        """Whether any CPU is fast enough."""
        step = self.step_flops / _SLOWEST
        return step < _LONG_STEP and step * self.steps < _LONG_RUN


def count_step_flops(model: nn.Module, tokens: float) -> float:
    """Forward and backward through the weight matrices (Kaplan et al. 2020), attention and vocabulary left out.

    Of a mixture of experts, the experts that a token goes to; frozen weights need no gradient of their own.
    """
    config = getattr(model, "config", None)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    vocabulary = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    flops = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and id(weight) not in vocabulary and "lm_head" not in name:
            flops += weight.numel() * (6 if weight.requires_grad else 4) * (share if ".experts." in name else 1.0)
    return flops * tokens


def measure_flops_per_s(hidden: int) -> float:
    """FLOP/s of this CPU on fp32 matrix products of a model's width, with torch's threads."""
    left, right = torch.ones(512, hidden), torch.ones(hidden, 4 * hidden)
    torch.mm(left, right)
    products, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _MEASURED_SECONDS:
        torch.mm(left, right)
        products += 1
    return products * 2.0 * 512 * hidden * 4 * hidden / seconds


def explain_cost(cost: Cost, flops_per_s: float, memory_limit: float) -> str | None:
    """Why a run is too much for a CPU; None where it is not."""
    step = cost.step_flops / flops_per_s
    reasons = []
    if step >= _LONG_STEP or step * cost.steps >= _LONG_RUN:
        reasons.append(
            f"at least {_format_time(step)} a step and {_format_time(step * cost.steps)} in all on this CPU "
            f"({flops_per_s / 1e9:.0f} GFLOP/s measured)"
        )
    if cost.memory > memory_limit:
        reasons.append(
            f"about {format_bytes(cost.memory)} of memory, and this machine has {format_bytes(memory_limit)}"
        )
    return "; ".join(reasons) or None


def _format_time(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.2g} seconds"
