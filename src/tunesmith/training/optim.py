"""AdamW with weight decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import nn

from tunesmith.config.schema import OptimSection
from tunesmith.errors import ConfigError

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}


def require_optimizer(name: str) -> None:
    """Fail early if the optimizer needs bitsandbytes and it is not installed."""
    if name in _BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optim.name",
            [f"{name} needs bitsandbytes, which is not installed: pip install 'tunesmith[qlora]'"],
            code="package-missing",
        )


def build_optimizer(model: nn.Module, optim: OptimSection, b_ratio: float = 1.0) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over the trainable parameters; 8-bit averages as in Dettmers et al. 2022.

    Weight decay applies to matrices only: biases and norms are scales, and embedding rows that no batch contains should
    not shrink.

    Args:
        b_ratio: ratio of the learning rate of an adapter's B matrices to that of the others (LoRA+, Hayou et al. 2024).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    faster = {id(p) for name, p in model.named_parameters() if ".lora_B." in name} if b_ratio != 1.0 else set()
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in faster]
    b_matrices = [p for p in model.parameters() if p.requires_grad and id(p) in faster]
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay, "lr_ratio": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_ratio": 1.0},
        {"params": b_matrices, "weight_decay": optim.weight_decay, "lr_ratio": b_ratio},
    ]
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    used = [group for group in groups if group["params"]]
    if optim.name == "adamw":
        return torch.optim.AdamW(used, fused=True, **options)
    import bitsandbytes

    kind: Any = getattr(bitsandbytes.optim, _BITSANDBYTES[optim.name])
    optimizer: torch.optim.Optimizer = kind(used, **options)
    return optimizer


def lr_at(step: int, total_steps: int, optim: OptimSection) -> float:
    """Learning rate of update number `step`, counted from 0.

    It rises linearly to optim.lr during warmup, then falls by optim.schedule to min_lr_ratio * lr, which it would reach
    one step after the last (cosine: Loshchilov and Hutter 2017).
    """
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil(optim.warmup_ratio * total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    if optim.schedule == "minimind":  # get_lr in MiniMind's training scripts
        return optim.lr * (0.1 + 0.5 * (1 + math.cos(math.pi * progress)))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
