"""How far a run is: what a checkpoint keeps beside weights, optimizer and torch's generators."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunesmith.data.feed import FIRST_PLACE, Place
from tunesmith.training.step import StepResult

T = TypeVar("T", int, float)
# A gradient norm this many times the mean of the last steps is a jump if the loss jumped too, or always if extreme:
# norms have heavy tails, and one alone says little
_JUMP, _EXTREME = 5.0, 50.0
_JUMP_LOSS = 3.0  # standard deviations above the mean of the last losses
_JUMP_WINDOW, _JUMP_STEPS = 50, 20  # steps that are looked back on, and how many there must be


@dataclass
class Progress:
    """Counts since step 0.

    Attributes:
        place: of the feed, where the next step begins.
        skipped: steps left out because their loss was not finite; skipped_in_a_row, the last ones of them.
        grad_norms, losses: of the last steps, to tell a jump by.
        source_tokens: of each source of a mix; else empty.
    """

    step: int = 0
    epoch: float = 0.0
    place: Place = FIRST_PLACE
    tokens: int = 0
    supervised_tokens: int = 0
    best_step: int | None = None
    best_eval_loss: float = math.inf
    evals_without_gain: int = 0
    stopped_early: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    grad_norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    source_tokens: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        best = self.best_eval_loss if math.isfinite(self.best_eval_loss) else None
        return {**self.__dict__, "best_eval_loss": best}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Progress:
        best = saved["best_eval_loss"]
        younger = ("losses", "source_tokens")  # checkpoints of earlier versions have none
        known = {f.name: saved[f.name] for f in fields(cls) if f.name not in younger}
        known |= {name: saved.get(name, []) for name in younger}
        return cls(**known | {"best_eval_loss": math.inf if best is None else best})

    def jump(self, grad_norm: float, loss: float) -> float | None:
        """How many times larger a step's gradient norm is than the mean of the last ones, where that is remarkable."""
        norms, losses = self.grad_norms, self.losses
        self.grad_norms = [*norms[1 - _JUMP_WINDOW :], grad_norm]
        self.losses = [*losses[1 - _JUMP_WINDOW :], loss]
        if len(norms) < _JUMP_STEPS or len(losses) < _JUMP_STEPS:
            return None
        usual = statistics.fmean(norms)
        times = grad_norm / usual if usual else 0.0
        if times > _EXTREME:
            return times
        highest = statistics.fmean(losses) + _JUMP_LOSS * statistics.pstdev(losses)
        return times if times > _JUMP and loss > highest else None


@dataclass
class Window:
    """Steps since the last logged one, for means that count every token once.

    Attributes:
        expert_counts: of all those steps, on the device that they were counted on.
        source_losses, source_targets: sums of each source of a mix; else empty.
    """

    loss_sum: float = 0.0
    router_sum: float = 0.0
    targets: int = 0
    tokens: int = 0
    steps: int = 0
    expert_counts: Tensor | None = None
    source_losses: list[float] = field(default_factory=list)
    source_targets: list[int] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0
    before_s: float = 0.0  # of the process that began the window

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count: tokens_per_s is the speed of training, not of evaluating or saving."""
        began = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - began

    def seconds(self) -> float:
        return self.before_s + time.perf_counter() - self.started - self.paused_s

    def restart_clock(self) -> None:
        """Training begins, or continues, now."""
        self.started = time.perf_counter()

    def add(self, result: StepResult, source_targets: Sequence[int] = ()) -> None:
        self.loss_sum += result.loss * result.num_targets
        self.router_sum += result.router_loss or 0.0
        self.targets += result.num_targets
        self.tokens += result.num_tokens
        self.steps += 1
        self.source_losses = add_lists(self.source_losses, result.source_losses)
        self.source_targets = add_lists(self.source_targets, source_targets)
        counts = result.expert_counts
        if counts is not None and self.expert_counts is not None:
            counts = self.expert_counts.to(counts.device) + counts
        self.expert_counts = self.expert_counts if counts is None else counts

    def to_json(self) -> dict[str, Any]:
        counts = self.expert_counts.tolist() if self.expert_counts is not None else None
        sums = {name: getattr(self, name) for name in (*_SUMS, *_BY_SOURCE)}
        return {**sums, "expert_counts": counts, "seconds": self.seconds()}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Window:
        counts = saved["expert_counts"]
        sums = {name: saved[name] for name in _SUMS} | {name: saved.get(name, []) for name in _BY_SOURCE}
        expert_counts = torch.tensor(counts) if counts is not None else None
        return cls(**sums, expert_counts=expert_counts, before_s=saved["seconds"])


_SUMS = ("loss_sum", "router_sum", "targets", "tokens", "steps")
_BY_SOURCE = ("source_losses", "source_targets")


def add_lists(sums: list[T], more: Sequence[T]) -> list[T]:
    """Elementwise; sums of other sources (none yet, or resumed with --allow data) begin anew."""
    return [one + other for one, other in zip(sums, more, strict=True)] if len(sums) == len(more) else list(more)


@dataclass(frozen=True, slots=True)
class TrainState:
    """A checkpoint's state.json.

    Attributes:
        total_steps: that the learning rate's schedule was made for.
        scaler: torch's GradScaler; empty where losses are not scaled.
        random: states of Python's and NumPy's generators.
    """

    progress: Progress
    total_steps: int
    window: Window
    scaler: Mapping[str, Any]
    random: Mapping[str, Any]

    @property
    def step(self) -> int:
        return self.progress.step

    def to_json(self) -> dict[str, Any]:
        return {
            **self.progress.to_json(),
            "total_steps": self.total_steps,
            "window": self.window.to_json(),
            "scaler": dict(self.scaler),
            "random": dict(self.random),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> TrainState:
        """Raises:
        KeyError: the name of a field that is missing.
        """
        progress, window = Progress.from_json(saved), Window.from_json(saved["window"])
        return cls(progress, saved["total_steps"], window, saved["scaler"], saved["random"])
