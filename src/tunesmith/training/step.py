"""One optimizer step: forwards, backwards, clipping, update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.feed import Batches
from tunesmith.data.pack import Batch
from tunesmith.distributed.spread import Spread
from tunesmith.distributed.world import OneProcess, World
from tunesmith.model.loss import LossSums, Objective, SupervisedLM, supervised_loss
from tunesmith.training.precision import Precision
from tunesmith.training.randomness import seed_forward
from tunesmith.training.transfer import OnTheWay, copied_ahead


@dataclass(frozen=True, slots=True)
class StepResult:
    """Means over the step's supervised tokens, of all processes.

    Attributes:
        expert_counts: how often each expert was chosen; on the CPU.
        source_losses: the loss of each source of a mix, summed over its targets; else empty.
    """

    loss: float
    router_loss: float | None
    grad_norm: float
    num_tokens: int
    num_targets: int
    expert_counts: Tensor | None = None
    source_losses: Sequence[float] = ()


class StepAborted(Exception):
    """A step was given up between two forwards: there are gradients, and no update was made."""


class NotFiniteError(Exception):
    """The loss or the gradient is NaN or infinite; no update was made."""

    def __init__(self, result: StepResult) -> None:
        super().__init__(f"loss {result.loss}, gradient norm {result.grad_norm}")


@dataclass(frozen=True, slots=True)
class MadeGradient:
    """A step before its update: its gradient, and its numbers, which may still be on their way from the device.

    Attributes:
        numbers: loss, router loss, losses of the sources, and norm.
        loss, grad_norm: on the device.
    """

    numbers: OnTheWay
    loss: Tensor
    grad_norm: Tensor
    expert_counts: OnTheWay | None
    has_router_loss: bool
    num_tokens: int
    num_targets: int

    def read(self) -> StepResult:
        """Waits until the device has made the gradient."""
        loss, router, *by_source, norm = self.numbers.wait().tolist()
        counts = self.expert_counts.wait() if self.expert_counts is not None else None
        router_loss = router if self.has_router_loss else None
        return StepResult(
            loss, router_loss, norm, self.num_tokens, self.num_targets, counts, source_losses=by_source
        )  # fmt: skip


def train_step(
    lm: SupervisedLM,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    max_grad_norm: float,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    world: World | None = None,
    spread: Spread | None = None,
    objective: Objective = supervised_loss,
    gives_up: Callable[[], bool] | None = None,
    seed: Sequence[int] = (),
    end_forwards: Callable[[], None] | None = None,
) -> StepResult:
    """One update; the host waits for the device once, to see that the numbers are finite. Arguments: `make_gradient`.

    Raises:
        NotFiniteError: they are not; there is no update.
        StepAborted: `gives_up` said so; there is no update.
    """
    made = make_gradient(
        lm, optimizer, batches, max_grad_norm, precision, scaler, world, spread, objective, gives_up, seed, end_forwards
    )
    result = made.read()
    # fp16 overflows now and then by design: its scaler skips that update and lowers the scale
    is_finite = math.isfinite(result.loss) and (math.isfinite(result.grad_norm) or scaler.is_enabled())
    if (world or OneProcess()).agree(not is_finite):
        raise NotFiniteError(result)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return result


def can_read_late(device: torch.device, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Whether a step's numbers are read a step later: on a GPU, which else would wait for the host, and with torch's
    fused optimizer, which skips an update by a number on the device."""
    is_fused = isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])
    return device.type == "cuda" and is_fused and not scaler.is_enabled()


def update_unread(optimizer: torch.optim.Optimizer, made: MadeGradient, world: World) -> None:
    """Update the weights unless the loss or the norm is not finite in some process; the host does not wait to know."""
    is_finite = torch.isfinite(made.loss) & torch.isfinite(made.grad_norm)
    owner: Any = optimizer
    owner.found_inf = world.sum((~is_finite).float()).clamp(max=1.0)
    try:
        optimizer.step()
    finally:
        del owner.found_inf
    optimizer.zero_grad(set_to_none=True)


def make_gradient(
    lm: SupervisedLM,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    max_grad_norm: float,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    world: World | None = None,
    spread: Spread | None = None,
    objective: Objective = supervised_loss,
    gives_up: Callable[[], bool] | None = None,
    seed: Sequence[int] = (),
    end_forwards: Callable[[], None] | None = None,
) -> MadeGradient:
    """The forwards and backwards of a step, and its clipped gradient. The host does not wait for a GPU.

    The loss is the sum over all supervised tokens of the step divided by their count. The split into forwards and
    processes does not change the gradient, except that of a router loss (see `Router`).

    Args:
        batches: the share of this process.
        gives_up: asked before each forward but the first, in all processes alike.
        seed: of the step. Dropout in a forward depends on it and on the forward's number alone, not on the process
            that makes it. Empty: dropout draws from torch's generator as it is.
        end_forwards: called after the last backward, before the processes sum their gradients.

    Raises:
        StepAborted: `gives_up` said so.
    """
    world, spread = world or OneProcess(), spread or Spread()
    num_parts = batches.num_samples if lm.router and lm.router.is_per_document else len(batches)
    counts = torch.tensor([batches.num_tokens, batches.num_targets, num_parts])  # of this process
    num_tokens, num_targets, num_parts = world.sum(counts).tolist()
    sums = _Sums(lm, batches.num_sources, num_targets, num_parts)
    with lm.computing():
        for batch, is_last in _until_given_up(copied_ahead(batches, lm), gives_up, end_forwards):
            if batch.is_empty and not spread.needs_equal_forwards:
                continue
            if seed:
                seed_forward(*seed, *batch.number)
            with precision.context(sums.device):
                found = objective(spread.callable(lm), batch)
            loss = _nothing_of(found) if batch.is_empty else sums.add(found)
            spread.backward(scaler.scale(loss), is_last)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread.sum_gradients(parameters)
    scaler.unscale_(optimizer)
    grad_norm = spread.clip(parameters, max_grad_norm)
    scalars = [*sums.of_all(world), grad_norm]
    chosen = world.sum(sums.expert_counts) if sums.expert_counts is not None else None
    return MadeGradient(
        OnTheWay(stack_numbers(scalars)), scalars[0], grad_norm, OnTheWay(chosen) if chosen is not None else None,
        bool(lm.router), num_tokens, num_targets,
    )  # fmt: skip


class _Sums:
    """What a step's forwards in this process add up to, on the device.

    Args:
        num_targets, num_parts: of the step, in all processes; the loss and the router loss are divided by them.
    """

    def __init__(self, lm: SupervisedLM, num_sources: int, num_targets: int, num_parts: int) -> None:
        first = next(lm.parameters())
        self.device = first.device
        dtype = torch.promote_types(first.dtype, torch.float32)  # of sums, also where nothing is summed
        self._num_targets, self._num_parts = max(1, num_targets), num_parts
        self._loss, self._router = torch.zeros(2, device=self.device, dtype=dtype).unbind()
        self._source_losses = torch.zeros(num_sources, device=self.device)
        self.expert_counts: Tensor | None = None
        if lm.router:
            self.expert_counts = torch.zeros(lm.router.num_experts, dtype=torch.int64, device=self.device)

    def add(self, found: LossSums) -> Tensor:
        """The loss of one forward, as a part of the step's."""
        loss = found.loss / self._num_targets
        self._loss = self._loss + loss.detach()
        if found.router_loss is not None:
            router_loss = found.router_loss / self._num_parts
            self._router = self._router + router_loss.detach()
            loss = loss + router_loss
        if found.expert_counts is not None and self.expert_counts is not None:
            self.expert_counts += found.expert_counts
        if found.source_losses is not None:
            self._source_losses = self._source_losses + found.source_losses
        return loss

    def of_all(self, world: World) -> list[Tensor]:
        """The loss, the router loss, and the loss of each source, summed over the processes."""
        by_source = world.sum(self._source_losses).unbind() if len(self._source_losses) else ()
        return [world.sum(self._loss), world.sum(self._router), *by_source]


def _nothing_of(sums: LossSums) -> Tensor:
    """Zero, through which the backward reaches every parameter."""
    nothing = sums.loss * 0.0
    return nothing if sums.router_loss is None else nothing + sums.router_loss * 0.0


def _until_given_up(
    batches: Iterator[Batch], gives_up: Callable[[], bool] | None, end_forwards: Callable[[], None] | None
) -> Iterator[tuple[Batch, bool]]:
    """The batches, each with whether it is the last one."""
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        yield batch, following is None
        if following is not None and gives_up is not None and gives_up():
            raise StepAborted
        batch = following
    if end_forwards is not None:
        end_forwards()


def stack_numbers(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of one device as one tensor."""
    dtype = functools.reduce(torch.promote_types, (scalar.dtype for scalar in scalars))
    return torch.stack([scalar.to(dtype) for scalar in scalars])
