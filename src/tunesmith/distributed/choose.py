"""Choose how the model is spread, from train.parallel and what is trained."""

from __future__ import annotations

import torch

from tunesmith.config.schema import RunConfig
from tunesmith.distributed.spread import Replicated, Spread
from tunesmith.distributed.world import World
from tunesmith.errors import ConfigError


def choose_parallel(config: RunConfig, world: World) -> str:
    """The resolved train.parallel: `auto` shards what is trained in full, and copies the model where an adapter is
    trained, since its gradients are small.

    Raises:
        ConfigError: the precision cannot be had with it.
    """
    name = config.train.parallel
    if name == "auto":
        is_small = config.lora.kind != "none" or config.train.precision == "fp16"
        name = "none" if world.size == 1 else "ddp" if is_small else "fsdp"
    if name == "fsdp" and config.train.precision == "fp16":
        raise ConfigError(
            "train.precision",
            ["fp16 scales its loss by what one process sees; with shards use bf16, or set train.parallel ddp"],
            code="parallel-does-not-fit",
        )
    if name == "fsdp" and config.lora.kind in ("pissa", "olora"):
        raise ConfigError(
            "lora.kind",
            [f"{config.lora.kind} is converted from the whole model at the end, which no process has; use lora, or "
             "train.parallel ddp"],
            code="parallel-does-not-fit",
        )  # fmt: skip
    return name


def build_spread(name: str, world: World, device: torch.device, autocast: torch.dtype | None) -> Spread:
    """Args:
    name: from `choose_parallel`.
    autocast: dtype of matrix products over fp32 weights, if they have one of their own.
    """
    if name == "fsdp":
        from tunesmith.distributed.fsdp import Sharded

        return Sharded(world, device, autocast)
    return Replicated(world) if name == "ddp" else Spread()
