"""The training loop: step, log, evaluate, save, in the order in which they happen."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

import torch

from tunesmith.config.schema import RunConfig
from tunesmith.config.train_keys import interval_steps
from tunesmith.data.feed import Step, StepFeed
from tunesmith.distributed.spread import Spread
from tunesmith.distributed.world import World
from tunesmith.errors import InterruptedRun, ModelError, RunError
from tunesmith.generation.held_out import HeldOutQuestions, mean_scores
from tunesmith.model.loss import SupervisedLM
from tunesmith.monitor.allocator import give_back_much
from tunesmith.monitor.pace import Pace
from tunesmith.monitor.profile import Profile
from tunesmith.monitor.usage import memory_gb, usage_record
from tunesmith.training.evaluate import evaluate
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.metrics import Record, Tracker, source_record
from tunesmith.training.optim import lr_at, set_lr
from tunesmith.training.precision import Precision
from tunesmith.training.progress import Progress, TrainState, Window, add_lists
from tunesmith.training.randomness import restore_random_states, take_random_states
from tunesmith.training.saver import Saver
from tunesmith.training.step import (
    MadeGradient,
    NotFiniteError,
    StepAborted,
    StepResult,
    make_gradient,
    train_step,
    update_unread,
)

T = TypeVar("T")
DEFAULT_SAVE_STEPS = 500
MAX_SKIPPED = 10  # steps in a row that train.on_nonfinite skip leaves out


@dataclass(frozen=True, slots=True)
class UnreadStep:
    """A step, its update included, that the device may still be computing."""

    step: Step
    lr: float
    made: MadeGradient


@dataclass
class Trainer:
    """Everything the loop works with; built in run/training.py from a new state or from a checkpoint's.

    Attributes:
        on_log: gets each record, and what could not be saved.
        questions: held-out rows that are answered at each evaluation; None: none.
        replies: where the answers go.
        on_doing: gets what is done between two steps, for the bar.
        saved_step: of the newest checkpoint.
        pace: what the loop is doing, and how long that took before.
        profile: of the steps of train.profile_steps, if any.
        reads_late: read the numbers of a step when the forwards and backwards of the next one are queued, so that a GPU
            does not wait for the host. The next update comes after that, so a run stops with the same weights.
        unread: such a step.
    """

    config: RunConfig
    feed: StepFeed
    lm: SupervisedLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    world: World
    spread: Spread
    saver: Saver
    trackers: list[Tracker]
    stop: StopRequest
    on_log: Callable[[Record, str], None]
    questions: HeldOutQuestions | None = None
    replies: Tracker | None = None
    on_doing: Callable[[str], None] = lambda text: None
    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)
    saved_step: int | None = None
    pace: Pace = field(default_factory=Pace)
    profile: Profile | None = None
    answer_failure: str = ""
    reads_late: bool = False
    unread: UnreadStep | None = None

    @property
    def made_step(self) -> int:
        """Number of the last step, read or not."""
        return self.progress.step + (self.unread is not None)

    @property
    def all_trackers(self) -> list[Tracker]:
        return [*self.trackers, *([self.replies] if self.replies else [])]

    def train(self) -> None:
        """Run all steps from where `progress` is, and save the last one.

        Raises:
            RunError: the loss stopped being finite; the rows of that step are named. Or the last checkpoint could not
                be saved.
            InterruptedRun: a signal asked the run to end; the last finished step is saved.
        """
        progress = self.progress
        self.lm.train()
        if self.feed.held_out is not None and progress.step == 0:
            self._log({"step": 0, "epoch": 0.0} | self._evaluate_first())  # what the model knows already
        self._saved_at = time.monotonic()
        self.window.restart_clock()
        with contextlib.closing(self.feed.steps(progress.place, self.world.rank, self.world.size)) as steps:
            self._train_on(steps)
        self.pace.is_at_end = True
        self._save_last()

    def _train_on(self, steps: Iterator[Step | None]) -> None:
        progress, total = self.progress, self.feed.total_steps
        while self.made_step < total and not progress.stopped_early:
            if (step := next(steps)) is None:  # its rows are still being labelled
                self.on_doing("labelling rows")
                if self.world.agree(self.stop.is_made):
                    self._stop()
                continue
            if self.profile is not None:
                self.profile.before(self.made_step + 1)
            record = self._whole_step(step)
            give_back_much()
            if self.profile is not None:
                with self.window.pause():
                    self.profile.after(self.made_step)
            if self.made_step == total or self._evaluates_now():
                record = self._read_unread() or record
            if self._evaluates_now():
                with self.window.pause():
                    record = (record or self._head()) | self._evaluate()
                    is_best = self._judge(record["eval_loss"])
            else:
                is_best = False
            if record:
                self._log(record)
            stops, is_asked, is_due = self._wishes()
            if stops:
                self._stop()
            if is_asked or is_due:
                self._log_unread()
            if is_asked or (progress.step < total and (is_best or is_due)):
                with self.window.pause():
                    self.save(is_asked)

    def _whole_step(self, step: Step) -> Record:
        """`_step`; where a signal arrives in it, the run ends between two of its forwards, as if it had not begun."""
        random = take_random_states()
        try:
            with self.pace.of_step(self.made_step + 1, step):
                return self._step(step)
        except StepAborted:
            self.optimizer.zero_grad(set_to_none=True)
            restore_random_states(*random)
            self.window.paused_s += self.pace.seconds()
            self._stop()

    def _gives_up(self) -> bool:
        self.pace.wait()
        gives_up = self.world.agree(self.stop.is_made)  # all of them make the same forwards
        self.pace.count_forward()
        return gives_up

    def _stop(self) -> NoReturn:
        self._log_unread()
        step = self.progress.step
        if step:  # a checkpoint of step 0 would hold what the run begins with anyway
            self._save_last()
        what = f"at step {step}, which is saved" if step else "before the end of step 1"
        raise InterruptedRun(f"interrupted {what}.", code="run-interrupted")

    def _step(self, step: Step) -> Record:
        """One update, or none where the loss is not finite; the record to log, if one is due."""
        lr = lr_at(self.made_step, self.feed.total_steps, self.config.optim)
        set_lr(self.optimizer, lr)
        if self.reads_late:
            made: MadeGradient = self._make(make_gradient, step)
            self._log_unread()  # here the run stops where the step before was not finite
            update_unread(self.optimizer, made, self.world)
            self.unread = UnreadStep(step, lr, made)
            return {}
        try:
            result: StepResult = self._make(train_step, step)
        except NotFiniteError as error:
            record = self._leave_out(step, error)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.update()
            return record
        return self._count(step, result, lr)

    def _make(self, function: Callable[..., T], step: Step) -> T:
        """make_gradient or train_step with the arguments of a step."""
        return function(
            self.lm, self.optimizer, step.batches, self.config.optim.max_grad_norm, self.precision, self.scaler,
            self.world, self.spread, gives_up=self._gives_up, seed=(self.config.train.seed, self.made_step),
            end_forwards=self.pace.end_forwards,
        )  # fmt: skip

    def _log_unread(self) -> None:
        if record := self._read_unread():
            self._log(record)

    def _read_unread(self) -> Record:
        """Wait for the step that is not read yet, if there is one; the record to log, if one is due."""
        unread, self.unread = self.unread, None
        if unread is None:
            return {}
        result = unread.made.read()
        if self.world.agree(not (math.isfinite(result.loss) and math.isfinite(result.grad_norm))):
            return self._leave_out(unread.step, NotFiniteError(result))
        return self._count(unread.step, result, unread.lr)

    def _count(self, step: Step, result: StepResult, lr: float) -> Record:
        """A step was made; the record to log, if one is due."""
        progress = self.progress
        progress.step += 1
        progress.epoch, progress.place = step.epoch, step.place
        progress.tokens += result.num_tokens
        progress.supervised_tokens += result.num_targets
        progress.skipped_in_a_row = 0
        sources = step.whole.count_sources()
        progress.source_tokens = add_lists(progress.source_tokens, sources.tokens)
        self.window.add(result, sources.targets)
        jump = progress.jump(result.grad_norm, result.loss) if math.isfinite(result.grad_norm) else None
        if not jump and progress.step % self.config.train.log_steps and progress.step != self.feed.total_steps:
            return {}
        record = self._record(self.window, lr, result.grad_norm)
        self.window = Window()
        return record | ({"grad_norm_jump": round(jump, 1), "rows": step.rows()} if jump else {})

    def _leave_out(self, step: Step, error: NotFiniteError) -> Record:
        """A step was not finite, and made no update.

        Raises:
            RunError: the run ends.
        """
        progress = self.progress
        if self.config.train.on_nonfinite == "stop" or progress.skipped_in_a_row >= MAX_SKIPPED:
            raise RunError(self._explain_not_finite(error, step.rows()), code="loss-not-finite") from None
        progress.step += 1
        progress.epoch, progress.place = step.epoch, step.place
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        return self._head() | {"skipped": progress.skipped, "rows": step.rows()}

    def _head(self) -> Record:
        return {"step": self.progress.step, "epoch": round(self.progress.epoch, 4)}

    def _log(self, record: Record) -> None:
        if not self.world.is_main:
            return
        record = record | {"time": round(time.time(), 1)}
        for tracker in self.trackers:
            tracker.log(record)
        self.on_log(record, self.saver.failure or self.answer_failure)

    def _record(self, window: Window, lr: float, grad_norm: float) -> Record:
        record = self._head() | {
            "loss": window.loss_sum / max(1, window.targets),
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self.progress.tokens,
            "supervised_tokens": self.progress.supervised_tokens,
            "tokens_per_s": round(window.tokens / window.seconds(), 1),
        } | self._usage()  # fmt: skip
        if self.feed.mix is not None:
            names, tokens = self.feed.mix.names, self.progress.source_tokens
            record |= source_record(names, window.source_losses, window.source_targets, tokens)
        if self.lm.router:
            record["router_loss"] = window.router_sum / window.steps
        counts = window.expert_counts.tolist() if window.expert_counts is not None else []
        if sum(counts):  # share of the tokens that went to each expert
            record["expert_load"] = [round(count / sum(counts), 4) for count in counts]
        return record

    def _usage(self) -> Record:
        """Memory and throughput of each process."""
        tokens, seconds = self.pace.take_work()
        memory = memory_gb(next(self.lm.parameters()).device)
        return usage_record(self.world, memory, tokens / seconds if seconds else 0.0)

    def _evaluates_now(self) -> bool:
        every, step, total = self.config.train.eval_steps, self.made_step, self.feed.total_steps
        is_due = step == total or (every is not None and step % interval_steps(every, total) == 0)
        return self.feed.held_out is not None and is_due

    def _evaluate(self) -> Record:
        assert self.feed.held_out is not None
        with self.pace.of("evaluation"):  # always to its end: a resumed run does not repeat it
            self.on_doing("evaluating")
            result = evaluate(self.lm, self.feed.held_out, self.precision, self.world)
            return result.to_record() | self._answer() | {"eval_s": round(self.pace.seconds(), 3)}

    def _answer(self) -> Record:
        """Answer a few held-out rows, as if it had not been done: the next step draws the same random numbers."""
        if not self.questions:
            return {}
        number = len(self.questions.questions)
        self.on_doing(f"answering {number} held-out row{'s' if number > 1 else ''}")
        random, self.answer_failure = take_random_states(), ""
        try:
            device = next(self.lm.parameters()).device
            with self.precision.context(device), self.lm.computing(), self.spread.callable_parts(self.lm):
                answers = self.questions.ask(self.lm)
        except (ModelError, torch.OutOfMemoryError) as error:  # training itself may go on
            self.answer_failure = f"the held-out rows could not be answered: {str(error).splitlines()[0]}"
            return {}
        finally:
            restore_random_states(*random)
        if self.replies is not None:
            self.replies.log(self._head() | {"replies": [answer.to_json() for answer in answers]})
        return mean_scores(answers)

    def _evaluate_first(self) -> Record:
        """Before step 1, where an interrupted evaluation is repeated."""
        assert self.feed.held_out is not None
        try:
            with self.pace.of("forward", len(self.feed.held_out)):
                self.on_doing("evaluating")
                result = evaluate(self.lm, self.feed.held_out, self.precision, self.world, gives_up=self._gives_up)
                eval_s = self.pace.seconds()
        except StepAborted:
            self._stop()
        with self.pace.of("evaluation"):
            answered = self._answer()
            return result.to_record() | answered | {"eval_s": round(eval_s + self.pace.seconds(), 3)}

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

    def _wishes(self) -> tuple[bool, bool, bool]:
        """Whether the run stops, whether a signal asked for a checkpoint, and whether one is due: in any process."""
        train, now = self.config.train, time.monotonic()
        is_late = bool(train.save_minutes) and now - self._saved_at >= 60 * (train.save_minutes or 0)
        is_asked, self.stop.wants_save = self.stop.wants_save, False
        own = torch.tensor([self.stop.is_made, is_asked, is_late], dtype=torch.int32)
        stops, is_asked, is_late = (count > 0 for count in self.world.sum(own).tolist())
        every = interval_steps(train.save_steps or DEFAULT_SAVE_STEPS, self.feed.total_steps)
        return stops, is_asked, is_late or self.made_step % every == 0

    def save(self, is_told: bool = False) -> None:
        """Take a snapshot and let it be written beside the next steps.

        Args:
            is_told: log where it is.
        """
        random, others = take_random_states()
        state = TrainState(self.progress, self.feed.total_steps, self.window, self.scaler.state_dict(), others)
        content = state.to_json()  # now: training changes it while it is written
        if self.world.is_main:
            for tracker in self.all_trackers:
                tracker.sync()  # what a resumed run will not log again must be on disk before its checkpoint
        if failure := self.saver.settle():
            self._log_failure(failure)
        snapshot = self.saver.take(self.optimizer, self.spread, random, content)
        if snapshot is not None:
            self.saver.save(snapshot, self.progress.best_step, is_told)
        self._saved_at, self.saved_step = time.monotonic(), self.progress.step

    def _save_last(self) -> None:
        failure = self.saver.settle()
        if failure or self.saved_step != self.progress.step:
            self.save()
        if failure := self.saver.settle():
            raise RunError(f"the last checkpoint could not be saved: {failure}. Free space there.", code="save-failed")

    def _log_failure(self, failure: str) -> None:
        if self.world.is_main:
            self.on_log(self._head(), failure)

    def explain_stop(self) -> str:
        """What a first signal leaves to be done; another thread asks."""
        self.pace.save_s = self.saver.seconds
        return self.pace.explain(self.made_step, self.saved_step)

    def _explain_not_finite(self, error: NotFiniteError, rows: list[str]) -> str:
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        before = f"The {self.progress.skipped_in_a_row} steps before it were skipped for the same reason. "
        return (
            f"step {self.progress.step + 1}: {error}. No update was made. The step's rows: {shown}. "
            f"{before if self.progress.skipped_in_a_row else ''}"
            "Look at these rows (tunesmith preview), lower optim.lr, or train in fp32 or bf16 instead of fp16."
        )
