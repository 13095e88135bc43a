"""The training loop: step, log, evaluate, save, in the order in which they happen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.config.schema import RunConfig
from tunesmith.data.pack import PackedBatch, build_batches
from tunesmith.errors import InterruptedRun, RunError
from tunesmith.model.loss import SupervisedLM, to_tensors
from tunesmith.train.checkpoint import Snapshot, copy_optimizer, copy_weights
from tunesmith.train.evaluate import EvalResult, evaluate
from tunesmith.train.interrupt import StopRequest
from tunesmith.train.metrics import Tracker
from tunesmith.train.optim import lr_at, set_lr
from tunesmith.train.plan import Plan, PlannedStep
from tunesmith.train.precision import Precision
from tunesmith.train.randomness import take_random_states
from tunesmith.train.saver import Saver

DEFAULT_SAVE_STEPS = 500
MAX_SKIPPED = 10  # steps in a row that train.on_nonfinite skip leaves out
_JUMP, _JUMP_WINDOW, _JUMP_STEPS = 5.0, 50, 20  # a gradient norm 5 times the mean of the last 50 steps, 20 at least


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


@dataclass
class Progress:
    """How far the run is; what a checkpoint remembers.

    Attributes:
        place: (epoch, pack in it) where the next step begins.
        skipped: steps left out because their loss was not finite; skipped_in_a_row, the last ones of them.
        grad_norms: the last ones, to tell a jump by.
    """

    step: int = 0
    epoch: float = 0.0
    place: tuple[int, int] = (0, 0)
    tokens: int = 0
    supervised_tokens: int = 0
    best_step: int | None = None
    best_eval_loss: float = math.inf
    evals_without_gain: int = 0
    stopped_early: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    grad_norms: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        best = self.best_eval_loss if math.isfinite(self.best_eval_loss) else None
        return {**self.__dict__, "place": list(self.place), "best_eval_loss": best}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Progress:
        best = saved["best_eval_loss"]
        known = {f.name: saved[f.name] for f in fields(cls)}
        return cls(**known | {"place": tuple(saved["place"]), "best_eval_loss": math.inf if best is None else best})

    def jump(self, grad_norm: float) -> float | None:
        """How many times larger a gradient norm is than the mean of the last ones, where that is remarkable."""
        usual = sum(self.grad_norms) / len(self.grad_norms) if len(self.grad_norms) >= _JUMP_STEPS else 0.0
        self.grad_norms = [*self.grad_norms[1 - _JUMP_WINDOW :], grad_norm]
        return grad_norm / usual if usual and grad_norm > _JUMP * usual else None


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

    def to_json(self) -> dict[str, Any]:
        counts = self.expert_counts.tolist() if self.expert_counts is not None else None
        sums = {name: getattr(self, name) for name in ("loss_sum", "router_sum", "targets", "tokens", "steps")}
        return {**sums, "expert_counts": counts, "seconds": self.seconds()}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Window:
        counts = saved["expert_counts"]
        sums = {name: saved[name] for name in ("loss_sum", "router_sum", "targets", "tokens", "steps")}
        started = time.perf_counter() - saved["seconds"]
        return cls(**sums, expert_counts=np.array(counts) if counts is not None else None, started=started)


@dataclass
class Trainer:
    """Everything the loop works with; made in run/start.py."""

    config: RunConfig
    run: Path
    lm: SupervisedLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: Plan
    precision: Precision
    saver: Saver
    trackers: list[Tracker]
    stop: StopRequest
    on_log: Callable[[dict[str, Any], str], None]
    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)
    saved_step: int | None = None

    def train(self) -> None:
        """Run all steps from where `progress` is, and save the last one.

        Raises:
            RunError: the loss stopped being finite; the rows of that step are named. Or the last checkpoint could not
                be saved.
            InterruptedRun: somebody asked the run to end; it is saved.
        """
        progress, total = self.progress, self.plan.total_steps
        self.lm.train()
        if self.plan.eval is not None and progress.step == 0:
            self._log({"step": 0, "epoch": 0.0} | self._evaluate().to_record())  # what the model knows already
        self._saved_at = time.monotonic()
        for planned in self.plan.steps(progress.place):
            if progress.step >= total or progress.stopped_early:
                break
            record = self._step(planned)
            if self._evaluates_now():
                with self.window.pause():
                    record = (record or self._head()) | self._evaluate().to_record()
                    is_best = self._judge(record["eval_loss"])
            else:
                is_best = False
            if record:
                self._log(record)
            if self.stop.is_made:
                self._save_last()
                raise InterruptedRun(f"interrupted at step {progress.step}, which is saved.")
            if progress.step < total and (is_best or self._saves_now()):
                with self.window.pause():
                    self.save()
        self._save_last()

    def _step(self, planned: PlannedStep) -> dict[str, Any]:
        """One update, or none where the loss is not finite; the record to log, if it is time for one."""
        train, progress = self.config.train, self.progress
        lr = lr_at(progress.step, self.plan.total_steps, self.config.optim)
        set_lr(self.optimizer, lr)
        batches = list(build_batches(self.plan.train, planned.packs, one_document=not self.lm.is_packed))
        try:
            result = train_step(
                self.lm, self.optimizer, batches, self.config.optim.max_grad_norm, self.precision, self.scaler
            )
        except NotFiniteError as error:
            return self._leave_out(planned, error, batches)
        progress.step += 1
        progress.epoch, progress.place = planned.epoch, planned.after
        progress.tokens += result.num_tokens
        progress.supervised_tokens += result.num_targets
        progress.skipped_in_a_row = 0
        self.window.add(result)
        jump = progress.jump(result.grad_norm) if math.isfinite(result.grad_norm) else None
        if not jump and progress.step % train.log_steps and progress.step != self.plan.total_steps:
            return {}
        record = self._record(self.window, lr, result.grad_norm)
        self.window = Window()
        return record | ({"grad_norm_jump": round(jump, 1), "rows": self._rows(batches)} if jump else {})

    def _leave_out(self, planned: PlannedStep, error: NotFiniteError, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        progress = self.progress
        if self.config.train.on_nonfinite == "stop" or progress.skipped_in_a_row >= MAX_SKIPPED:
            raise RunError(self._explain_not_finite(error, batches)) from None
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        progress.step += 1
        progress.epoch, progress.place = planned.epoch, planned.after
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        return self._head() | {"skipped": progress.skipped, "rows": self._rows(batches)}

    def _head(self) -> dict[str, Any]:
        return {"step": self.progress.step, "epoch": round(self.progress.epoch, 4)}

    def _log(self, record: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(record)
        self.on_log(record, self.saver.failure)

    def _record(self, window: Window, lr: float, grad_norm: float) -> dict[str, Any]:
        record = self._head() | {
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

    def _evaluates_now(self) -> bool:
        every, step = self.config.train.eval_steps, self.progress.step
        return self.plan.eval is not None and (step == self.plan.total_steps or bool(every and step % every == 0))

    def _evaluate(self) -> EvalResult:
        assert self.plan.eval is not None
        device = next(self.lm.parameters()).device
        return evaluate(self.lm, self.plan.eval, self.plan.eval_packs, self.precision, device)

    def _judge(self, eval_loss: float) -> bool:
        """Whether this is the best model so far, and so worth a checkpoint; notes where patience has run out."""
        if not self.config.train.eval_steps:
            return False
        progress = self.progress
        if eval_loss < progress.best_eval_loss:
            progress.best_eval_loss, progress.best_step = eval_loss, progress.step
            progress.evals_without_gain = 0
            return True
        progress.evals_without_gain += 1
        patience = self.config.train.early_stop_patience
        progress.stopped_early = bool(patience and progress.evals_without_gain >= patience)
        return False

    def _saves_now(self) -> bool:
        train = self.config.train
        is_due = bool(train.save_minutes) and time.monotonic() - self._saved_at >= 60 * (train.save_minutes or 0)
        return is_due or self.progress.step % (train.save_steps or DEFAULT_SAVE_STEPS) == 0

    def save(self) -> None:
        """Take a snapshot and let it be written beside the next steps."""
        random, others = take_random_states()
        model = self.lm.model
        state = {
            **self.progress.to_json(),
            "total_steps": self.plan.total_steps,
            "window": self.window.to_json(),
            "scaler": self.scaler.state_dict(),
            "random": others,
        }
        for tracker in self.trackers:
            tracker.sync()  # what a resumed run will not log again must be on disk before its checkpoint
        self.saver.wait()
        if self.saver.failure:
            self.on_log(self._head(), self.saver.failure)
        snapshot = Snapshot(copy_weights(self.lm), copy_optimizer(model, self.optimizer), random, state)
        self.saver.save(snapshot, self.progress.best_step)
        self._saved_at, self.saved_step = time.monotonic(), snapshot.step

    def _save_last(self) -> None:
        self.saver.wait()
        if self.saved_step != self.progress.step or self.saver.failure:
            self.save()
        self.saver.wait()
        if self.saver.failure:
            raise RunError(f"the last checkpoint could not be saved: {self.saver.failure}. Make room there.")

    def _rows(self, batches: Sequence[PackedBatch]) -> list[str]:
        return [self.plan.train.where(sample) for batch in batches for sample in batch.samples]

    def _explain_not_finite(self, error: NotFiniteError, batches: Sequence[PackedBatch]) -> str:
        rows = self._rows(batches)
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        before = f"{self.progress.skipped_in_a_row} steps before it were left out already. "
        return (
            f"step {self.progress.step + 1}: {error}. No update was made. The step was made of {shown}. "
            f"{before if self.progress.skipped_in_a_row else ''}"
            "Look at these rows (tunesmith preview), lower optim.lr, or train in fp32 or bf16 instead of fp16."
        )
