"""Choose how the model is spread, from train.parallel and what is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tunesmith.config.deepspeed_file import read_deepspeed, require_deepspeed, wants_deepspeed
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
    name = "deepspeed" if wants_deepspeed(config.train) else config.train.parallel
    if name == "auto":
        is_small = config.lora.kind != "none" or config.train.precision == "fp16"
        name = "none" if world.size == 1 else "ddp" if is_small else "fsdp"
    if name == "deepspeed":
        _check_deepspeed(config)
    if name == "fsdp" and config.train.precision == "fp16":
        raise ConfigError(
            "train.precision",
            ["fp16 scales its loss by what one process sees; with shards use bf16, or set train.parallel ddp"],
            code="parallel-does-not-fit",
        )
    if name in ("fsdp", "deepspeed") and config.lora.kind in ("pissa", "olora"):
        raise ConfigError(
            "lora.kind",
            [f"{config.lora.kind} is converted from the whole model at the end, which no process has; use lora, or "
             "train.parallel ddp"],
            code="parallel-does-not-fit",
        )  # fmt: skip
    return name


def _check_deepspeed(config: RunConfig) -> None:
    """Raises:
    ConfigError: DeepSpeed cannot train this.
    """
    require_deepspeed()
    train, problems = config.train, []
    read_deepspeed(config, train.precision)  # before any data is read
    if other := {"fp16": "ddp", "bf16_pure": "fsdp"}.get(train.precision):
        problems.append(
            f"train.precision: {train.precision} is not supported with DeepSpeed here; use bf16 (fp32 weights, matrix "
            f"products in bf16), or train.parallel {other}"
        )
    if config.optim.name != "adamw":
        problems.append(
            f"optim.name: {config.optim.name} keeps averages in blocks that DeepSpeed would cut; use adamw, or "
            "train.parallel ddp"
        )
    if config.lora.quantize != "none":
        problems.append(
            f"lora.quantize: {config.lora.quantize} weights cannot be kept in DeepSpeed's parts; use none, or "
            "train.parallel fsdp"
        )
    if train.compile:
        problems.append(
            "train.compile: DeepSpeed's hooks are not compiled; set it to false, or use train.parallel fsdp"
        )
    if problems:
        raise ConfigError("train.parallel deepspeed", problems, code="parallel-does-not-fit")


def build_spread(
    name: str,
    world: World,
    device: torch.device,
    compute: torch.dtype | None,
    config: RunConfig,
    tell: Callable[[str], None],
) -> Spread:
    """Args:
    name: from `choose_parallel`.
    compute: dtype of matrix products over fp32 weights, if they have one of their own.
    tell: shows a remark to the user.
    """
    if name == "fsdp":
        from tunesmith.distributed.fsdp import Sharded

        return Sharded(world, device, compute)
    if name == "deepspeed":
        from tunesmith.distributed.deepspeed import Zero

        file = read_deepspeed(config, "bf16" if compute else "fp32")
        for note in file.notes:
            tell(note)
        return Zero(world, device, file, config.optim.max_grad_norm, tell)
    return Replicated(world) if name == "ddp" else Spread()
