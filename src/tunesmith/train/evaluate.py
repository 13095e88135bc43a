"""Loss, perplexity and token accuracy on held-out rows, summed pack by pack; no logits are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tunesmith.data.pack import build_batches
from tunesmith.data.store import TokenStore
from tunesmith.model.loss import SupervisedLM, to_tensors
from tunesmith.train.precision import Precision


@dataclass(frozen=True, slots=True)
class EvalResult:
    loss: float
    token_accuracy: float

    def to_record(self) -> dict[str, float]:
        perplexity = math.exp(self.loss) if self.loss < 700 else math.inf
        return {"eval_loss": self.loss, "eval_perplexity": perplexity, "eval_token_accuracy": self.token_accuracy}


@torch.no_grad()
def evaluate(
    lm: SupervisedLM, store: TokenStore, plan: Sequence[np.ndarray], precision: Precision, device: torch.device
) -> EvalResult:
    """Means over all supervised tokens of the plan, dropout off."""
    lm.eval()
    loss_sum = 0.0
    num_correct = num_targets = 0
    for batch in build_batches(store, plan, one_document=not lm.is_packed):
        with precision.context(device):
            sums = lm(**to_tensors(batch, device))
        loss_sum += sums.loss.item()
        num_correct += int(sums.num_correct.item())
        num_targets += batch.num_targets
    lm.train()
    return EvalResult(loss_sum / max(1, num_targets), num_correct / max(1, num_targets))
