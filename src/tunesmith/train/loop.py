"""The training loop: step, log, evaluate, save, in the order in which they happen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.config import RunConfig
from tunesmith.data.encode import Encoder
from tunesmith.data.pack import PackedBatch, build_batches, plan_epoch
from tunesmith.data.store import TokenStore
from tunesmith.errors import RunError
from tunesmith.model.loss import SupervisedLM, to_tensors
from tunesmith.train.checkpoint import prune_checkpoints, save_checkpoint
from tunesmith.train.evaluate import EvalResult, evaluate
from tunesmith.train.metrics import Tracker
from tunesmith.train.optim import lr_at, set_lr
from tunesmith.train.precision import Precision

DEFAULT_SAVE_STEPS = 500


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step: means over the step's supervised tokens."""

    loss: float
    router_loss: float | None
    grad_norm: float
    num_tokens: int
    num_targets: int
    expert_counts: np.ndarray | None = None


def train_step(
    lm: SupervisedLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    max_grad_norm: float,
    precision: Precision,
    scaler: torch.amp.GradScaler,
) -> StepResult:
    """One update. The loss is the sum over all supervised tokens of the step divided by their count.

    Whatever the split into forwards, the gradient is the same; only a router loss, which is not linear in the batch,
    is a mean over the forwards.
    """
    device = next(lm.parameters()).device
    num_targets = max(1, sum(batch.num_targets for batch in batches))
    loss_sum = torch.zeros((), device=device)
    router_sum = torch.zeros((), device=device) if lm.router else None
    expert_counts = np.zeros(lm.router.num_experts, dtype=np.int64) if lm.router else None
    for batch in batches:
        with precision.context(device):
            sums = lm(**to_tensors(batch, device))
        loss = sums.loss / num_targets
        loss_sum = loss_sum + loss.detach()
        if sums.router_loss is not None:
            router_loss = sums.router_loss / len(batches)
            router_sum = router_sum + router_loss.detach()
            loss = loss + router_loss
            expert_counts += sums.expert_counts.cpu().numpy()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    result = StepResult(
        loss=loss_sum.item(),
        router_loss=None if router_sum is None else router_sum.item(),
        grad_norm=grad_norm.item(),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_targets=sum(batch.num_targets for batch in batches),
        expert_counts=expert_counts,
    )
    # fp16 overflows now and then by design: its scaler skips that update and lowers the scale
    if not math.isfinite(result.loss) or not (math.isfinite(result.grad_norm) or scaler.is_enabled()):
        raise NotFiniteError(result)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return result


class NotFiniteError(Exception):
    """The loss or the gradient is NaN or infinite; no update was made."""

    def __init__(self, result: StepResult) -> None:
        super().__init__(f"loss {result.loss}, gradient norm {result.grad_norm}")


@dataclass(frozen=True)
class Plan:
    """Which samples are trained, in which packs, and how many steps that makes.

    Attributes:
        train_ids, eval_ids: sample numbers of the stores.
        total_steps: optimizer steps of the run.
        first_epoch: the packs of epoch 0, for the summary.
    """

    train: TokenStore
    train_ids: np.ndarray
    eval: TokenStore | None
    eval_packs: list[np.ndarray]
    capacity: int
    seed: int
    grad_accum_steps: int
    total_steps: int
    first_epoch: list[np.ndarray]

    def epoch(self, number: int) -> list[np.ndarray]:
        packs = plan_epoch(self.train.lengths[self.train_ids], self.capacity, self.seed, number)
        return [self.train_ids[pack] for pack in packs]

    def steps(self) -> Iterator[tuple[float, list[np.ndarray]]]:
        """Epochs done after the step, and the packs of the step; endless."""
        number = 0
        while True:
            packs = self.first_epoch if number == 0 else self.epoch(number)
            for start in range(0, len(packs), self.grad_accum_steps):
                group = packs[start : start + self.grad_accum_steps]
                yield number + (start + len(group)) / len(packs), group
            number += 1


@dataclass
class Progress:
    """How far the run is; what a checkpoint remembers."""

    step: int = 0
    epoch: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    best_step: int | None = None
    best_eval_loss: float = math.inf
    evals_without_gain: int = 0

    def to_json(self) -> dict[str, Any]:
        best = self.best_eval_loss if math.isfinite(self.best_eval_loss) else None
        return {**self.__dict__, "best_eval_loss": best}


@dataclass
class Window:
    """Steps since the last logged one, for means that count every token once."""

    loss_sum: float = 0.0
    router_sum: float = 0.0
    targets: int = 0
    tokens: int = 0
    steps: int = 0
    expert_counts: np.ndarray | None = None
    started: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count: tokens_per_s is the speed of training, not of evaluating or saving."""
        began = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - began

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused_s

    def add(self, result: StepResult) -> None:
        self.loss_sum += result.loss * result.num_targets
        self.router_sum += result.router_loss or 0.0
        self.targets += result.num_targets
        self.tokens += result.num_tokens
        self.steps += 1
        if result.expert_counts is not None:
            before = 0 if self.expert_counts is None else self.expert_counts
            self.expert_counts = before + result.expert_counts


@dataclass
class Trainer:
    """Everything the loop works with; made in train/run.py."""

    config: RunConfig
    run: Path
    lm: SupervisedLM
    optimizer: torch.optim.Optimizer
    encoder: Encoder
    plan: Plan
    precision: Precision
    trackers: list[Tracker]
    on_log: Callable[[dict[str, Any]], None]
    progress: Progress = field(default_factory=Progress)

    def train(self) -> None:
        """Run all steps.

        Raises:
            RunError: the loss stopped being finite; the rows of that step are named.
        """
        train, progress, total = self.config.train, self.progress, self.plan.total_steps
        scaler = self.precision.scaler(next(self.lm.parameters()).device)
        save_steps = train.save_steps or DEFAULT_SAVE_STEPS
        self.lm.train()
        if self.plan.eval is not None:
            self._log({"step": 0, "epoch": 0.0} | self._evaluate().to_record())  # what the model knows already
        window = Window()
        for epoch, packs in self.plan.steps():
            lr = lr_at(progress.step, total, self.config.optim)
            set_lr(self.optimizer, lr)
            batches = list(build_batches(self.plan.train, packs, one_document=not self.lm.is_packed))
            try:
                result = train_step(
                    self.lm, self.optimizer, batches, self.config.optim.max_grad_norm, self.precision, scaler
                )
            except NotFiniteError as error:
                raise RunError(self._explain_not_finite(error, batches)) from None
            progress.step += 1
            progress.epoch = epoch
            progress.tokens += result.num_tokens
            progress.supervised_tokens += result.num_targets
            window.add(result)
            is_last = progress.step == total
            record = {}
            if progress.step % train.log_steps == 0 or is_last:
                record = self._record(window, lr, result.grad_norm)
                window = Window()
            stop_early = False
            if self._evaluates_now(is_last):
                with window.pause():
                    record = (record or {"step": progress.step, "epoch": progress.epoch}) | self._evaluate().to_record()
                    stop_early = self._judge(record["eval_loss"])
            if record:
                self._log(record)
            if progress.step % save_steps == 0 and not is_last and progress.best_step != progress.step:
                with window.pause():
                    self._save()
            if is_last or stop_early:
                return

    def _log(self, record: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(record)
        self.on_log(record)

    def _record(self, window: Window, lr: float, grad_norm: float) -> dict[str, Any]:
        record = {
            "step": self.progress.step,
            "epoch": round(self.progress.epoch, 4),
            "loss": window.loss_sum / max(1, window.targets),
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self.progress.tokens,
            "supervised_tokens": self.progress.supervised_tokens,
            "tokens_per_s": round(window.tokens / window.seconds(), 1),
        }
        if self.lm.router:
            record["router_loss"] = window.router_sum / window.steps
        if window.expert_counts is not None:  # share of the tokens that went to each expert
            record["expert_load"] = [round(float(x), 4) for x in window.expert_counts / window.expert_counts.sum()]
        return record

    def _evaluates_now(self, is_last: bool) -> bool:
        every = self.config.train.eval_steps
        return self.plan.eval is not None and (is_last or bool(every and self.progress.step % every == 0))

    def _evaluate(self) -> EvalResult:
        assert self.plan.eval is not None
        device = next(self.lm.parameters()).device
        return evaluate(self.lm, self.plan.eval, self.plan.eval_packs, self.precision, device)

    def _judge(self, eval_loss: float) -> bool:
        """Keep the best model; True where patience has run out."""
        if not self.config.train.eval_steps:
            return False
        progress = self.progress
        if eval_loss < progress.best_eval_loss:
            progress.best_eval_loss, progress.best_step = eval_loss, progress.step
            progress.evals_without_gain = 0
            if progress.step < self.plan.total_steps:  # the last step's weights become RUN/model anyway
                self._save()
        else:
            progress.evals_without_gain += 1
        patience = self.config.train.early_stop_patience
        return bool(patience and progress.evals_without_gain >= patience)

    def _save(self) -> None:
        state = self.progress.to_json()
        save_checkpoint(self.run, self.lm.model, self.optimizer, self.encoder, state)
        prune_checkpoints(self.run, self.config.train.keep_checkpoints, self.progress.best_step)

    def _explain_not_finite(self, error: NotFiniteError, batches: Sequence[PackedBatch]) -> str:
        rows = [self.plan.train.where(sample) for batch in batches for sample in batch.samples]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        return (
            f"step {self.progress.step + 1}: {error}. No update was made. The step was made of {shown}. "
            "Look at these rows (tunesmith preview), lower optim.lr, or train in fp32 or bf16 instead of fp16."
        )
