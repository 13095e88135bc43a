"""Learning rates compared by trials: short runs from the same start, on the first steps of the run at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tunesmith.config.schema import OptimSection, RunConfig
from tunesmith.data.feed import StepFeed
from tunesmith.model.loss import SupervisedLM
from tunesmith.training.evaluate import evaluate
from tunesmith.training.optim import build_optimizer, lr_at, set_lr
from tunesmith.training.precision import Precision
from tunesmith.training.randomness import seed_all
from tunesmith.training.step import NotFiniteError, train_step

STEP = math.sqrt(10)  # factor between neighbouring rates
SMALLEST, LARGEST = 1e-8, 10.0  # rates that are tried


class Trials:
    """Trains the model from its first weights again and again, each time with another learning rate.

    The model ends with its first weights.

    Args:
        feed: of the run; its held-out data judges a trial.
        max_packs: of the held-out data that are evaluated.
    """

    def __init__(
        self, lm: SupervisedLM, feed: StepFeed, config: RunConfig, precision: Precision, max_packs: int
    ) -> None:
        assert feed.held_out is not None
        self._lm, self._feed, self._config, self._precision = lm, feed, config, precision
        self._held_out = replace(feed.held_out, packs=feed.held_out.packs[:max_packs])
        self._trained = [p for p in lm.parameters() if p.requires_grad]
        self._start = [p.detach().to("cpu", copy=True) for p in self._trained]

    def first_loss(self) -> float:
        """eval_loss before any training."""
        return evaluate(self._lm, self._held_out, self._precision).loss

    def measure(self, lr: float, num_steps: int) -> float:
        """eval_loss after a whole run of so many steps, its warmup and schedule included; inf where it diverges."""
        config, lm = self._config, self._lm
        optim = shorten(config.optim, num_steps / self._feed.total_steps).model_copy(update={"lr": lr})
        optimizer = build_optimizer(lm.model, optim, config.lora.lr_ratio)
        device = next(lm.parameters()).device
        scaler = self._precision.scaler(device)
        seed_all(config.train.seed)
        lm.train()
        try:
            for number, step in zip(range(num_steps), self._feed.steps(), strict=False):
                assert step is not None  # its data are on disk
                set_lr(optimizer, lr_at(number, num_steps, optim))
                train_step(lm, optimizer, step.batches, optim.max_grad_norm, self._precision, scaler,
                           seed=(config.train.seed, number))  # fmt: skip
            loss = evaluate(lm, self._held_out, self._precision).loss
        except NotFiniteError:
            loss = math.inf
        finally:
            self._restore()
        return loss if math.isfinite(loss) else math.inf

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, value in zip(self._trained, self._start, strict=True):
            parameter.copy_(value)
            parameter.grad = None


def shorten(optim: OptimSection, share: float) -> OptimSection:
    """The section for a run of a share of the steps."""
    if optim.warmup_steps is None:
        return optim
    return optim.model_copy(update={"warmup_steps": math.ceil(optim.warmup_steps * share)})


@dataclass(frozen=True, slots=True)
class Trial:
    lr: float
    loss: float


def search_lr(measure: Callable[[float], float], first: float, before: float = math.inf) -> list[Trial]:
    """Rates and their losses, in the order in which they were tried, until the lowest loss has both neighbours.

    Walks from `first` by factors of 10 in the direction in which the loss falls, then tries the two rates a factor of
    sqrt(10) beside the best. That takes five trials where `first` is right, and one more for each factor of 10 that it
    is off. Assumes that the loss rises on both sides of its minimum, up to where training diverges.

    Args:
        before: loss before training; a rate that ends above it counts as diverged, and the walk goes down from there.
    """
    trials: dict[int, Trial] = {}
    first = min(max(first, SMALLEST), LARGEST)

    def loss_at(place: int) -> float:
        if place not in trials:
            lr = first * STEP**place
            if not SMALLEST <= lr <= LARGEST:
                return math.inf
            trials[place] = Trial(lr, measure(lr))
        loss = trials[place].loss
        return loss if loss < before else math.inf

    best = 0
    direction = 2 if loss_at(2) < loss_at(0) else -2
    while loss_at(best + direction) < loss_at(best) or (loss_at(best) == math.inf and first * STEP**best > SMALLEST):
        best += direction
    loss_at(best - 1), loss_at(best + 1)
    best = min(trials, key=loss_at)
    loss_at(best - 1), loss_at(best + 1)
    return list(trials.values())


def lowest(trials: list[Trial]) -> float:
    """The rate at which a parabola through the lowest loss and its neighbours, over log lr, is lowest.

    At most half a step from the best rate that was tried; that rate itself where a neighbour diverged.
    """
    best = min(trials, key=lambda trial: trial.loss)
    beside = [next((t for t in trials if math.isclose(t.lr, best.lr * STEP**k, rel_tol=1e-6)), best) for k in (-1, 1)]
    low, middle, high = beside[0].loss, best.loss, beside[1].loss
    bend = low - 2 * middle + high
    if len({best.lr, *(trial.lr for trial in beside)}) < 3 or not 0 < bend < math.inf:
        return best.lr
    return best.lr * math.pow(STEP, max(-0.5, min(0.5, (low - high) / (2 * bend))))
