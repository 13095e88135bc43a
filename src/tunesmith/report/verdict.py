"""What a run's figures say, in words: one line of summary, and a finding for each thing to change, with its key.

A finding needs figures that are clearly more than noise; a run that went well has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.config.schema import DEFAULT_LORA_LR, OptimSection, RunConfig
from tunesmith.data.fit import NOTE_CUT_REPLY
from tunesmith.report.records import RunRecords
from tunesmith.report.replies import SampleReplies
from tunesmith.report.ticks import format_tick, format_value
from tunesmith.report.trend import Change, change_of, largest_rise

_NEW_LR = 1e-3  # that random weights are usually trained with
_HIGH_LR = 1e-2  # AdamW's largest of practice is about a tenth of this
_FEW_STEPS, _SOME_STEPS = 10, 50  # too few whatever happened; too few where nothing happened
_KNOWN, _HIGH_LOSS = 0.3, 4.0  # nats: below, there is little to fall; above, the model is far from knowing the data
# shares of a loss: a fall that is none; one that is little from a high loss; a rise; a jump; a large one; a plateau
_NOTHING, _LITTLE, _RISE, _JUMP, _LARGE_JUMP, _PLATEAU = 0.01, 0.05, 0.02, 0.15, 0.5, 0.015
_EVAL_RISE = 0.01
_GAP = 0.25  # nats, by which eval_loss may be above one and a half times the loss
_LEARNT_BY_HEART = 0.1
_CUT, _LOST = 0.05, 0.1  # share of rows whose reply is cut; of tokens lost
_MANY_EPOCHS = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the figures show, and what to try.

    Attributes:
        code: names the kind of finding and stays the same when the words change.
        what: what the figures show.
        advice: what to try next, with the keys to change.
        changes: keys and about the values that the advice gives them.
    """

    code: str
    what: str
    advice: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.what} {self.advice}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run went, judged by its figures."""

    summary: str
    findings: list[Finding] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [f"verdict: {self.summary}", *(f"- {finding}" for finding in self.findings)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Figures:
    """What the verdict is made of.

    Attributes:
        change: of the training loss; None with fewer than two records.
        evals: steps and eval_loss.
    """

    config: RunConfig
    steps: int
    epochs: float
    losses: Sequence[float]
    loss_steps: Sequence[int]
    evals: Sequence[tuple[int, float]]
    change: Change | None
    skipped: int
    is_finished: bool

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best evaluation are those that were saved."""
        return self.is_finished and self.config.train.eval_steps is not None

    @property
    def usual_lr(self) -> float:
        """The default for what is trained."""
        if self.config.lora.kind != "none":
            return DEFAULT_LORA_LR
        is_new = self.config.model.path.startswith("new:")
        return _NEW_LR if is_new else float(OptimSection.model_fields["lr"].default)

    @property
    def start(self) -> float:
        """The loss before training: of held-out rows, or of the first step, whose loss is that of the old weights."""
        return self.evals[0][1] if self.evals and self.evals[0][0] == 0 else self.losses[0]

    @property
    def best(self) -> tuple[int, float] | None:
        """The lowest evaluation after step 0."""
        return min((e for e in self.evals if e[0] > 0), key=lambda e: e[1], default=None)

    @property
    def eval_change(self) -> tuple[float, float] | None:
        """eval_loss before training and at the end."""
        if len(self.evals) < 2 or self.evals[0][0] != 0:
            return None
        return self.evals[0][1], self.evals[-1][1]

    def epoch_at(self, step: int) -> float:
        return self.epochs * step / max(1, self.steps)

    def change_since(self, step: int) -> Change | None:
        """Of the training loss, from around a step to the end."""
        later = [loss for at, loss in zip(self.loss_steps, self.losses, strict=True) if at >= step]
        return change_of(later) if len(later) >= 2 else None


def figures_of(run: RunRecords) -> Figures:
    loss_steps, losses = run.series("loss")
    eval_steps, evals = run.series("eval_loss")
    epochs = max((record.get("epoch") or 0.0 for record in run.records), default=0.0)
    return Figures(
        config=run.config,
        steps=run.last_step,
        epochs=epochs,
        losses=losses,
        loss_steps=loss_steps,
        evals=list(zip(eval_steps, evals, strict=True)),
        change=change_of(losses) if len(losses) > 1 else None,
        is_finished=run.folder.has_complete_model,
        skipped=max((int(record.get("skipped") or 0) for record in run.records), default=0),
    )


def judge(run: RunRecords, samples: SampleReplies) -> Verdict:
    """The verdict on a run, finished or not.

    Args:
        samples: replies of its finished model, where there are any.
    """
    figures = figures_of(run)
    if not run.records:
        return Verdict("no step was logged, so there is nothing to judge.")
    findings = [
        *_judge_steps(figures),
        *_judge_loss(figures),
        *_judge_eval(figures),
        *_judge_length(run),
    ]
    return Verdict(summarise(figures), [*findings, *_judge_replies(run, samples, findings)])


def summarise(figures: Figures) -> str:
    """One line: what eval_loss and loss did over how many steps."""
    over = f"{_count(figures.steps, 'step')} ({_count(figures.epochs, 'epoch')})"
    parts = []
    if figures.eval_change and figures.best:
        first, last = figures.eval_change
        text = f"eval_loss {_from_to(first, last)} over {over}"
        best_step, best = figures.best
        if best_step != figures.evals[-1][0] and last - best > _EVAL_RISE * best:
            text += f", lowest {format_value(best)} at step {best_step:,}"
        elif _is_still_falling(figures):
            text += ", still falling at the end"
        parts.append(text)
        over = ""
    change = figures.change
    if change is not None and figures.steps > 1:
        parts.append(f"loss {_from_to(change.first, change.last)}" + (f" over {over}" if over else ""))
    elif figures.losses:
        parts.append(f"loss {format_value(figures.losses[-1])}" + (f" after {over}" if over else ""))
    else:
        parts.append(f"no loss was logged in {over}" if over else "no loss was logged")
    if not figures.evals:
        way = "give data.eval" if figures.config.data.stream else "data.eval_split 0.05 holds some out"
        parts.append(f"no held-out rows ({way})")
    return "; ".join(parts) + "."


def _count(number: float, what: str) -> str:
    """1 -> "1 step"."""
    text = f"{number:,}" if isinstance(number, int) else format_value(number, 3)
    return f"{text} {what}" if text == "1" else f"{text} {what}s"


def _from_to(first: float, last: float) -> str:
    share = (last - first) / first if first > 0 else 0.0
    if format_value(first) == format_value(last):
        return f"stayed at {format_value(last)}"
    verb = "fell" if last < first else "rose"
    return f"{verb} from {format_value(first)} to {format_value(last)} ({share:+.{0 if abs(share) >= 0.1 else 1}%})"


def _is_still_falling(figures: Figures) -> bool:
    """Whether the last evaluation is the lowest, and below the one before by a twentieth of the whole fall."""
    values = [loss for _, loss in figures.evals]
    if len(values) < 4 or values[-1] > min(values):
        return False
    return values[-2] - values[-1] > max(0.05 * (values[0] - values[-1]), 0.002 * values[-1])


def _judge_steps(figures: Figures) -> Iterator[Finding]:
    train = figures.config.train
    if figures.skipped:
        lower = _one_digit(figures.config.optim.lr / 3)
        yield Finding(
            "steps-not-finite",
            f"{figures.skipped:,} of {figures.steps:,} steps were left out because their loss was not finite.",
            f"Try --optim.lr {format_tick(lower)}, or train in fp32 or bf16 instead of fp16.",
            {"optim.lr": lower},
        )
    change = figures.change
    has_done_nothing = change is None or change.share < _NOTHING
    if figures.steps >= (_SOME_STEPS if has_done_nothing else _FEW_STEPS) or not figures.steps:
        return
    what = f"{figures.steps:,} step{'s are' if figures.steps != 1 else ' is'} too few to tell how training goes"
    what += "." if figures.steps < _FEW_STEPS else " where the loss hardly changes."
    if train.max_steps is not None and train.max_steps <= figures.steps:
        more = max(200, 10 * figures.steps)
        yield Finding("few-steps", what, f"Try --train.max_steps {more}.", {"train.max_steps": more})
        return
    if figures.epochs < 1:
        yield Finding("few-steps", what, "Continue the run: tunesmith resume.")
        return
    epochs = _one_digit(min(10.0, max(2 * train.epochs, 100 / figures.steps)))
    changes: dict[str, Any] = {"train.epochs": epochs}
    if train.grad_accum_steps > 1:
        changes = {"train.grad_accum_steps": max(1, train.grad_accum_steps // 4)} | changes
    words = " or ".join(f"--{key} {format_tick(value)}" for key, value in changes.items())
    advice = f"Try {words}, or a smaller train.micro_batch_tokens, which gives more steps an epoch."
    yield Finding("few-steps", what, advice, changes)


def _judge_loss(figures: Figures) -> Iterator[Finding]:
    """A loss that rose, jumped, stopped falling or did not fall, and the learning rate that it points to."""
    change, lr = figures.change, figures.config.optim.lr
    if change is None:
        return
    eval_change = figures.eval_change
    has_risen = change.has_risen and -change.share > _RISE
    is_worse = eval_change is not None and eval_change[1] > eval_change[0] * (1 + _RISE) and not change.has_fallen
    if has_risen or is_worse:
        first, last = (change.first, change.last) if has_risen or eval_change is None else eval_change
        yield _lower_lr(
            "loss-rose",
            f"The {'loss' if has_risen else 'eval_loss'} rose from {format_value(first)} to {format_value(last)}: "
            f"optim.lr {format_tick(lr)} is too high.",
            lr / 10,
        )
        return
    rise = largest_rise(figures.losses, figures.start)
    if rise.is_clear and rise.share > _JUMP:
        at = figures.loss_steps[rise.high_at]
        yield _lower_lr(
            "loss-jumped",
            f"The loss rose from {format_value(rise.low)} to {format_value(rise.high)} by step {at:,} before it fell "
            f"again: training is not stable at optim.lr {format_tick(lr)}.",
            lr / 10 if rise.share > _LARGE_JUMP else lr / 3,
            " or a longer warmup (--optim.warmup_ratio 0.1)",
        )
        return
    later = figures.change_since(figures.steps // 4)
    if lr >= _HIGH_LR and later is not None and later.share < _PLATEAU and later.last > _KNOWN:
        yield _lower_lr(
            "loss-stuck",
            f"The loss stays at {format_value(later.last)} from the first quarter of the run on: optim.lr "
            f"{format_tick(lr)} may be too high.",
            lr / 10,
        )
        return
    yield from _judge_fall(figures, change)


def _lower_lr(code: str, what: str, lr: float, other: str = "") -> Finding:
    lower = _one_digit(lr)
    return Finding(
        code, what, f"Try --optim.lr {format_tick(lower)}{',' if other else ''}{other}.", {"optim.lr": lower}
    )


def _judge_fall(figures: Figures, change: Change) -> Iterator[Finding]:
    """A loss that hardly fell; of held-out rows where they were evaluated, since that has less noise."""
    eval_change = figures.eval_change
    first, last = eval_change or (change.first, change.last)
    share = (first - last) / first if first > 0 else 0.0
    is_enough = share >= (_LITTLE if last > _HIGH_LOSS else _NOTHING)
    if is_enough or first < _KNOWN or figures.steps < _FEW_STEPS or (eval_change and change.share > _LITTLE):
        return  # a loss that fell on the trained rows alone is judged with eval_loss
    lr, usual = figures.config.optim.lr, figures.usual_lr
    name = "eval_loss" if eval_change else "loss"
    what = f"The {name} hardly fell ({format_value(first)} to {format_value(last)} in {figures.steps:,} steps)"
    if lr >= _HIGH_LR:
        yield _lower_lr("loss-did-not-fall", f"{what}: optim.lr {format_tick(lr)} may be too high.", lr / 10)
        return
    is_unknown = last > _HIGH_LOSS or figures.config.model.path.startswith("new:")
    value = _one_digit(max(10 * lr, min(usual, 100 * lr)))
    yield Finding(
        "loss-did-not-fall",
        f"{what}: optim.lr {format_tick(lr)} is too low for so few steps"
        + ("." if is_unknown else ", or the model knows this data already."),
        f"Try --optim.lr {format_tick(value)}.",
        {"optim.lr": value},
    )


def _judge_eval(figures: Figures) -> Iterator[Finding]:
    """Overfitting: held-out rows get worse, or stay far behind, while the trained ones get better."""
    best, change = figures.best, figures.change
    if best is None:
        yield from _judge_without_eval(figures)
        return
    step, lowest = best
    last_step, last = figures.evals[-1]
    before = figures.evals[0][1] if figures.evals[0][0] == 0 else None
    since = figures.change_since(step)
    rose = last - lowest > _EVAL_RISE * lowest and last - lowest > 0.05 * max(0.0, (before or lowest) - lowest)
    if step != last_step and rose and since is not None and since.has_fallen:
        epochs = _half(figures.epoch_at(step))
        saved = f" The weights of step {step:,} are saved." if figures.keeps_best else ""
        yield Finding(
            "overfitting",
            f"Overfitting: eval_loss was lowest at step {step:,} (epoch {format_value(figures.epoch_at(step), 2)}), at "
            f"{format_value(lowest)}, and rose to {format_value(last)} while the loss fell on.{saved}",
            f"Try --train.epochs {format_tick(epochs)}, more data, or a lower --optim.lr.",
            {"train.epochs": epochs},
        )
    elif before is not None and last > before * (1 + _EVAL_RISE) and change is not None and change.has_fallen:
        yield _look_closer(
            figures,
            "eval-worse-than-before",
            f"eval_loss is higher than before training ({format_value(before)} to {format_value(last)}), although the "
            "loss fell: overfitting, or held-out rows of another kind.",
        )
    elif change is not None and len(figures.evals) < 4 and figures.epochs >= 2 and last > 1.5 * change.last + _GAP:
        yield _look_closer(
            figures,
            "eval-far-behind",
            f"eval_loss {format_value(last)} is far above the loss {format_value(change.last)} after "
            f"{_count(figures.epochs, 'epoch')}: much of it is learnt by heart.",
        )


def _look_closer(figures: Figures, code: str, what: str) -> Finding:
    """Evaluate along the way where only the ends were evaluated, else train less."""
    if figures.config.train.eval_steps:
        return Finding(code, what, "Try fewer --train.epochs, a lower --optim.lr, or more data.")
    every = max(1, figures.steps // max(4, min(20, round(2 * figures.epochs))))
    advice = f"Try --train.eval_steps {every}, which saves the weights of the lowest eval_loss, or train fewer epochs."
    return Finding(code, what, advice, {"train.eval_steps": every})


def _judge_without_eval(figures: Figures) -> Iterator[Finding]:
    change = figures.change
    if figures.epochs < _MANY_EPOCHS or change is None or not change.has_fallen:
        return
    what = f"{format_value(figures.epochs, 3)} epochs without held-out rows: overfitting cannot be seen."
    if change.last < _LEARNT_BY_HEART:
        what += f" The loss of {format_value(change.last)} says that the rows are learnt by heart."
    is_stream = figures.config.data.stream  # which cannot hold rows out
    flag = "Give held-out rows with --eval-data and" if is_stream else "Try --data.eval_split 0.1 with"
    yield Finding(
        "no-eval",
        what,
        f"{flag} train.eval_steps: the weights with the lowest eval_loss are then saved.",
        {} if is_stream else {"data.eval_split": 0.1},
    )


def _judge_length(run: RunRecords) -> Iterator[Finding]:
    """Replies that were cut before their stop token, and text that was lost."""
    part = run.ledger["train"]
    used = sum(entry["used"] for entry in part["files"].values())
    cut = sum(len(rows) for entry in part["files"].values() for rows in [entry["notes"].get(NOTE_CUT_REPLY, [])])
    lost_each = [item["tokens_lost"] for entry in part["files"].values() for item in entry["truncated"]]
    lost = sum(lost_each)
    total = lost + int(part.get("tokens") or 0)
    if not used or not (cut > _CUT * used or lost > _LOST * total):
        return
    length = run.config.data.max_seq_len
    cuts = [f"the last reply of {cut:,} of {used:,} rows is cut before its stop token"] if cut > _CUT * used else []
    losses = [f"{lost / total:.{0 if lost >= 0.1 * total else 1}%} of the tokens are lost"] if lost else []
    what = " and ".join([*cuts, *losses])
    what = f"{what[0].upper()}{what[1:]} at data.max_seq_len{f' {length}' if length else ''}."
    changes: dict[str, Any] = {"data.overlong": "split"}
    advice = "Try a larger --data.max_seq_len"
    if length is not None and lost_each:
        wanted = length + sorted(lost_each)[int(0.95 * (len(lost_each) - 1))]  # keeps 19 of 20 of these rows whole
        changes["data.max_seq_len"] = wanted = math.ceil(wanted / 64) * 64
        advice = f"Try --data.max_seq_len {wanted}"
        micro_batch = run.config.train.micro_batch_tokens
        if micro_batch is not None and micro_batch < wanted:
            changes["train.micro_batch_tokens"] = wanted
            advice += f" with --train.micro_batch_tokens {wanted}"
    yield Finding("replies-cut", what, f"{advice}, or --data.overlong split.", changes)


def _judge_replies(run: RunRecords, samples: SampleReplies, others: Sequence[Finding]) -> Iterator[Finding]:
    judged = [reply for reply in samples.replies if not reply.is_text]
    endless = sum(reply.is_endless for reply in judged)
    if endless < max(3, 0.6 * len(judged)):
        return
    what = f"{endless} of {len(judged)} sampled replies do not stop: they repeat themselves, or are twice as long as "
    what += "the ones in the data."
    if others:
        yield Finding("replies-do-not-stop", what, "The advice above comes first.")
        return
    epochs = _half(2 * run.config.train.epochs)
    yield Finding(
        "replies-do-not-stop",
        what,
        f"Check that stop tokens are trained (tunesmith preview marks them), then train longer: --train.epochs "
        f"{format_tick(epochs)}.",
        {"train.epochs": epochs},
    )


def _one_digit(value: float) -> float:
    """Rounded to one significant digit."""
    return float(f"{value:.0e}")


def _half(epochs: float) -> float:
    """Rounded to halves, at least 0.5."""
    return max(0.5, round(2 * epochs) / 2)
