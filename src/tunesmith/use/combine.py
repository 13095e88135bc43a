"""Combine several adapters into one with peft's add_weighted_adapter, without loading the base's weights."""

from __future__ import annotations

import difflib
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.adapters.adapter import quiet_peft, write_adapter
from tunesmith.adapters.adapter_config import read_adapter_config
from tunesmith.adapters.deltas import Delta
from tunesmith.adapters.open_adapter import open_adapter
from tunesmith.config.choices import MERGE_METHODS
from tunesmith.errors import ModelError, RunError, UsageError

_NOT_COMBINED = {
    "use_dora": "is a DoRA adapter",
    "trainable_token_indices": "has rows of added tokens",
    "modules_to_save": "has modules trained in full (modules_to_save)",
    "bias": "has trained biases",
}


@dataclass(frozen=True)
class MergePlan:
    """Inputs of a merge.

    Attributes:
        base: folder of the base's files.
        adapters: PEFT folders, in order.
        method: one of config.choices.MERGE_METHODS: TIES (Yadav et al. 2023), DARE (Yu et al. 2024) and others of peft.
        weights: one per adapter.
        density: share of values kept by TIES, DARE and pruning, in (0, 1].
        seed: for DARE's random choice.
        trust_remote_code: whether to run Python code in the base's folder.
    """

    base: Path
    adapters: tuple[Path, ...]
    method: str
    weights: tuple[float, ...]
    density: float
    seed: int
    trust_remote_code: bool = False


def read_weights(
    num_adapters: int, method: str, weights: Sequence[float] | None, density: float, seed: int
) -> tuple[float, ...]:
    """The weight of each adapter, after checking all options of the merge.

    Raises:
        UsageError: an option has an invalid value, or cannot be combined with the others.
    """
    if method not in MERGE_METHODS:
        guess = difflib.get_close_matches(method, MERGE_METHODS, n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"use one of {', '.join(MERGE_METHODS)}."
        raise UsageError(f"merge: method {method!r} is unknown; {hint}", code="unknown-method")
    if not 0 < density <= 1:
        raise UsageError(
            f"merge: density must be a share above 0 and at most 1, such as 0.5, not {density}.", code="density-value"
        )
    if not 0 <= seed < 2**63:
        raise UsageError(f"merge: seed must be a whole number of 0 or more, such as 42, not {seed}.", code="seed-value")
    if (weights or method != "sequential") and num_adapters == 1:
        raise UsageError("merge: method and weights need several adapters; one is given.", code="one-adapter")
    if weights and method == "sequential":
        raise UsageError(
            "merge: weights need a method that adds adapters, such as linear.", code="weights-without-method"
        )
    found = tuple(weights or [1.0] * num_adapters)
    if len(found) != num_adapters:
        raise UsageError(
            f"merge: {len(found)} weights for {num_adapters} adapters; give one for each.", code="wrong-weight-count"
        )
    if not all(map(math.isfinite, found)):
        raise UsageError(
            f"merge: weights must be finite numbers, such as 1 0.5, not {list(found)}.", code="weight-value"
        )
    return found


@contextmanager
def deltas_of(plan: MergePlan) -> Iterator[tuple[list[Delta], list[Path]]]:
    """Changes to apply in order, and PEFT folders with the same effect on the base."""
    if len(plan.adapters) == 1 or plan.method == "sequential":
        yield [Delta(folder) for folder in plan.adapters], list(plan.adapters)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = combine(plan, Path(temporary) / "combined")
        yield [Delta(folder)], [folder]


def combine(plan: MergePlan, folder: Path) -> Path:
    """Combine several adapters into one with peft's add_weighted_adapter, on a model without weights."""
    for adapter in plan.adapters:
        own = read_adapter_config(adapter)
        for key, what in _NOT_COMBINED.items():
            if getattr(own, key) not in (None, False, "none", [], {}):
                raise ModelError(
                    f"{adapter}: {what}, which peft cannot combine. Merge the adapters one after another: --method "
                    "sequential.",
                    code="not-combinable",
                )
    config = AutoConfig.from_pretrained(plan.base, trust_remote_code=plan.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=plan.trust_remote_code)
    weightless(model)
    names = [f"adapter_{index}" for index in range(len(plan.adapters))]
    options: dict[str, Any] = {} if plan.method in ("linear", "cat", "svd") else {"density": plan.density}
    torch.manual_seed(plan.seed)
    wrapped: Any = None
    for name, adapter in zip(names, plan.adapters, strict=True):
        wrapped = open_adapter(model, adapter, name, onto=wrapped, is_weightless=True)
    try:
        with quiet_peft():
            wrapped.base_model.add_weighted_adapter(
                names, list(plan.weights), "default", combination_type=plan.method, **options
            )
            made = wrapped.peft_config["default"]
            made.base_model_name_or_path = str(plan.base)
            made.use_rslora = False  # its alpha equals its rank already
            from peft import get_peft_model_state_dict

            state = get_peft_model_state_dict(wrapped, adapter_name="default", save_embedding_layers=False)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"these adapters cannot be combined by {plan.method}: {' '.join(str(error).split())}. Merge them one after "
            "another: --method sequential.",
            code="not-combinable",
        ) from None
    write_adapter(wrapped, folder, {name: tensor.contiguous() for name, tensor in state.items()})
    if plan.method == "cat":
        _compare_sum(plan, folder)
    return folder


def _compare_sum(plan: MergePlan, folder: Path) -> None:
    """Compare the concatenated adapters with the weighted sum of their changes, computed without peft."""
    combined, singles = Delta(folder), [Delta(adapter) for adapter in plan.adapters]
    for name, parts in combined.parts.items():
        wanted = torch.zeros(len(parts["lora_B"]), parts["lora_A"].shape[1])
        for weight, single in zip(plan.weights, singles, strict=True):
            if name in single.parts:
                wanted = wanted + weight * single.apply(name, torch.zeros_like(wanted))
        if not torch.allclose(combined.apply(name, torch.zeros_like(wanted)), wanted, rtol=1e-4, atol=1e-6):
            raise RunError(
                f"{name}: the combined adapter is not the sum of the adapters. No files were kept.",
                code="combined-differs",
            )


def weightless(model: nn.Module) -> None:
    """Replace every weight by an expanded scalar zero: on the CPU, where peft adds adapters, but without memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
