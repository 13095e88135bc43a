"""FSDP2: each process keeps a shard of each parameter, gradient and average (Zhao et al. 2023; torch's fully_shard)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tunesmith.distributed.blocks import find_blocks
from tunesmith.distributed.held import Held, shard_rows
from tunesmith.distributed.shards import Shard, StoredTensor
from tunesmith.distributed.spread import Spread
from tunesmith.distributed.world import World
from tunesmith.model.loss import SupervisedLM


class Sharded(Spread):
    """Every block of the model is sharded by itself, what is left (embedding, last norm, head) together.

    Args:
        compute: dtype of matrix products where it differs from the weights' (bf16 over fp32 weights).
    """

    name = "fsdp"
    needs_equal_forwards = True
    must_gather = True

    def __init__(self, world: World, device: torch.device, compute: torch.dtype | None) -> None:
        self._device, self._world = device, world
        self._mesh = init_device_mesh(device.type, (world.size,))
        self._policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32) if compute else MixedPrecisionPolicy()

    def prepare(self, lm: SupervisedLM) -> None:
        held = Held(lm)
        for block in find_blocks(lm.model):
            fully_shard(block, mesh=self._mesh, mp_policy=self._policy)
        fully_shard(lm, mesh=self._mesh, mp_policy=self._policy)
        held.fill(self._device)
        for module in lm.modules():
            if isinstance(module, FSDPModule):
                # sums, not means; gloo cannot scale while it sums
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        move_buffers(lm, self._device)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        norm = super().clip(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole(self, tensor: Tensor) -> Tensor:
        full = tensor.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor()
            return full.cpu() if self._world.is_main else torch.empty(0)
        return full.to("cpu", copy=True)

    def shard(self, tensor: Tensor) -> Shard | None:
        local: Any = tensor.detach()
        if not isinstance(local, DTensor):
            return super().shard(tensor) if self._world.is_main else None
        start, stop = shard_rows(tensor.shape[0], self._world.rank, self._world.size)
        if start == stop:
            return None
        return Shard(local.to_local().to("cpu", copy=True).contiguous(), start, tuple(tensor.shape))

    def part(self, tensor: StoredTensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return super().part(tensor, like)  # a count of steps
        rows = tensor.read(*shard_rows(tensor.shape[0], self._world.rank, self._world.size))
        return DTensor.from_local(
            rows.to(self._device, copy=True), like.device_mesh, like.placements, run_check=False, shape=like.shape,
            stride=like.stride(),
        )  # fmt: skip

    @contextmanager
    def callable_parts(self, lm: SupervisedLM) -> Iterator[None]:
        root = cast(FSDPModule, lm)
        root.unshard()
        try:
            yield
        finally:
            root.reshard()


def move_buffers(lm: nn.Module, device: torch.device) -> None:
    """fully_shard moves parameters; tables such as the rotary embedding's frequencies stay where they were."""
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None and buffer.device != device:
                module.register_buffer(
                    name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
                )
