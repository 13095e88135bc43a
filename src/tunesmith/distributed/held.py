"""Parameters of which a process has its shard alone, from loading until the model is sharded.

A held parameter has its shape, type and device, so that adapters can be added and sizes counted; its values are zeros
that take no memory. The shard lies beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def hold(part: Tensor, shape: torch.Size, requires_grad: bool) -> nn.Parameter:
    """A parameter of this shape whose shard here is `part`."""
    parameter: Any = nn.Parameter(torch.zeros((), dtype=part.dtype).expand(shape), requires_grad)
    parameter.part = part
    result: nn.Parameter = parameter
    return result


def part_of(parameter: Tensor) -> Tensor | None:
    """The shard of a held parameter; None for any other tensor."""
    part: Tensor | None = getattr(parameter, "part", None)
    return part


def shard_rows(length: int, rank: int, size: int) -> tuple[int, int]:
    """First row, and the one after the last, of a process's shard: that of torch.chunk, which FSDP2 uses."""
    rows = -(-length // size)
    return min(rank * rows, length), min((rank + 1) * rows, length)


class Held:
    """The held parameters of a model, replaced by parameters without memory while the model is sharded."""

    def __init__(self, model: nn.Module) -> None:
        self._found: list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = []
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or part_of(parameter) is None:
                    continue
                if id(parameter) not in places:  # tied ones have several places
                    places[id(parameter)] = []
                    self._found.append((parameter, places[id(parameter)]))
                places[id(parameter)].append((module, name))
        for parameter, where in self._found:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            _put(where, nn.Parameter(empty, parameter.requires_grad))

    def fill(self, device: torch.device) -> None:
        """After sharding: give each sharded parameter its values."""
        from torch.distributed.tensor import DTensor

        while self._found:
            parameter, where = self._found.pop()
            part: Any = part_of(parameter)
            module, name = where[0]
            sharded: Any = getattr(module, name)
            local = DTensor.from_local(
                part.to(device), sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape,
                stride=sharded.stride(),
            )  # fmt: skip
            _put(where, nn.Parameter(local, parameter.requires_grad))


def _put(where: list[tuple[nn.Module, str]], parameter: nn.Parameter) -> None:
    for module, name in where:
        setattr(module, name, parameter)
