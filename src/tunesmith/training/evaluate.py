"""Loss, perplexity and token accuracy on held-out rows, summed batch by batch; no logits are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tunesmith.data.feed import Batches
from tunesmith.distributed.world import OneProcess, World
from tunesmith.model.loss import Objective, SupervisedLM, supervised_loss
from tunesmith.training.metrics import mean_by_source
from tunesmith.training.precision import Precision
from tunesmith.training.step import StepAborted
from tunesmith.training.transfer import copied_ahead


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Means over the supervised tokens.

    Attributes:
        source_loss: loss by name, of rows that are held out from the sources of a mix; else empty.
    """

    loss: float
    token_accuracy: float
    source_loss: Mapping[str, float] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        perplexity = math.exp(self.loss) if self.loss < 700 else math.inf
        by_source = {"eval_source_loss": dict(self.source_loss)} if self.source_loss else {}
        means = {"eval_loss": self.loss, "eval_perplexity": perplexity, "eval_token_accuracy": self.token_accuracy}
        return {**means, **by_source}


@torch.no_grad()
def evaluate(
    lm: SupervisedLM,
    batches: Batches,
    precision: Precision,
    world: World | None = None,
    objective: Objective = supervised_loss,
    gives_up: Callable[[], bool] | None = None,
) -> EvalResult:
    """Means over all supervised tokens, without dropout. Synchronizes with the device only once, at the end.

    Args:
        gives_up: asked before each forward, in all processes alike.

    Raises:
        StepAborted: `gives_up` said so.
    """
    world = world or OneProcess()
    whole, batches = batches, batches.share(world.rank, world.size)
    device = next(lm.parameters()).device
    # loss, correct tokens, and the loss of each source; exact as float64, which MPS lacks
    sums = torch.zeros(2 + batches.num_sources, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    lm.eval()
    for batch in copied_ahead(batches, lm):
        if gives_up is not None and gives_up():
            raise StepAborted
        with lm.computing(), precision.context(device):
            found = objective(lm, batch)
        if batch.is_empty:
            continue
        assert found.num_correct is not None
        sums[0] += found.loss.to(sums)
        sums[1] += found.num_correct.to(sums)
        if found.source_losses is not None:
            sums[2:] += found.source_losses.to(sums)
    lm.train()
    num_targets = max(1, world.sum(torch.tensor(batches.num_targets)).tolist())
    loss_sum, num_correct, *by_source = world.sum(sums).tolist()
    names = whole.mix.names if whole.mix is not None else ()
    source_loss = mean_by_source(names, by_source, whole.count_sources().targets)
    return EvalResult(loss_sum / num_targets, num_correct / num_targets, source_loss)
