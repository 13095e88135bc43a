"""How a model is spread over the processes: not at all, whole on each (ddp), or in shards (fsdp)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.shards import Shard, StoredTensor
from tunesmith.distributed.world import World
from tunesmith.model.loss import SupervisedLM


class Spread:
    """A model in one process, and the base of the others.

    The gradient of a step is the sum over its forwards in all processes, each of a loss that is divided by the step's
    own count already: nothing is averaged.

    Attributes:
        name: as in train.parallel.
        needs_equal_forwards: whether each process must make the same number of forwards in a step.
        must_gather: whether process 0 lacks parts of the weights, so that all processes take part in saving.
    """

    name = "none"
    needs_equal_forwards = False
    must_gather = False

    def prepare(self, lm: SupervisedLM) -> None:
        """Spread the model; after this call, and before the optimizer is built."""

    def attach(self, lm: SupervisedLM, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer that the loop uses, after `prepare`."""
        return optimizer

    def callable(self, lm: SupervisedLM) -> nn.Module:
        """What is called for a forward that a backward follows."""
        return lm

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Args:
        is_last: of this process in the step.
        """
        loss.backward()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """After the last backward of a step: all processes get, or keep their shard of, the summed gradient."""

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Clip the gradients' common norm; returns the norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)

    def whole(self, tensor: Tensor) -> Tensor:
        """A copy of a whole tensor on the CPU; an empty one where only process 0 gets it. Every process calls this."""
        return tensor.detach().to("cpu", copy=True)

    def shard(self, tensor: Tensor) -> Shard | None:
        """A copy of what this process has of a tensor, on the CPU; None if another process saves it."""
        whole = tensor.detach().to("cpu", copy=True).contiguous()
        return Shard(whole, 0, tuple(whole.shape))

    def part(self, tensor: StoredTensor, like: Tensor) -> Tensor:
        """What this process keeps of a saved tensor that belongs to a parameter, such as an average of AdamW.

        Args:
            like: the parameter.
        """
        return tensor.read().to(like.device, copy=True)

    def copy_state(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Any]]:
        """The optimizer's state of each parameter: key and whole value. Every process calls this."""
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items():
                yield parameter, key, self.whole(value) if isinstance(value, Tensor) else value

    def set_state(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, value: StoredTensor
    ) -> None:
        """Keep what belongs to this process of a value that `copy_state` gave."""
        optimizer.state[parameter][key] = self.part(value, parameter)

    @contextmanager
    def whole_adapter(self, lm: SupervisedLM) -> Iterator[None]:
        """Within the block, the weights of the adapter are whole. Every process calls this."""
        yield

    @contextmanager
    def callable_parts(self, lm: SupervisedLM) -> Iterator[None]:
        """Within the block, parts of the model (its decoder) may be called by themselves, as generation does."""
        yield


class Replicated(Spread):
    """The whole model on each process, and gradients summed once a step.

    They are summed after the last backward, in buckets: parameters that a process did not use in this step (an expert
    that no token chose) need no special care, and a process without data takes part without a forward.
    """

    name = "ddp"
    _BUCKET = 2**25  # numbers of one collective

    def __init__(self, world: World) -> None:
        self._world = world

    def whole(self, tensor: Tensor) -> Tensor:
        return super().whole(tensor) if self._world.is_main else torch.empty(0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        # on the CPU: the processes exchange it without waiting for their GPUs
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        used = self._world.sum(used).bool()
        for group in self._buckets([p for p, is_used in zip(parameters, used.tolist(), strict=True) if is_used]):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            total = self._world.sum(torch.cat([grad.reshape(-1) for grad in grads]))
            for parameter, grad in zip(group, total.split([p.numel() for p in group]), strict=True):
                parameter.grad = grad.view_as(parameter)

    def _buckets(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        bucket: list[nn.Parameter] = []
        for parameter in parameters:
            is_full = sum(p.numel() for p in bucket) + parameter.numel() > self._BUCKET
            if bucket and (is_full or parameter.dtype != bucket[0].dtype):
                yield bucket
                bucket = []
            bucket.append(parameter)
        if bucket:
            yield bucket
